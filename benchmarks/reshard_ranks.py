"""What the ranks of `reshard_speed.py` run: weights of two training ranks, and what stands for an engine's memory."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybridflow.controller.dispatch import dispatch
from hybridflow.controller.worker import Worker
from hybridflow.resharding import incoming as incoming_module
from hybridflow.resharding.buckets import view
from hybridflow.resharding.incoming import Checksums, Incoming, Outgoing, assemble, checksum, expected_checksums
from hybridflow.resharding.layout import Layout
from hybridflow.resharding.plan import Move, Plan
from hybridflow.resharding.proofs import Receipt
from hybridflow.resharding.published import mapped
from hybridflow.resharding.transfer import Processes, execute
from hybridflow.resharding.transport import Delivery, Offer, RankLayout, Transport

SAMPLE_S = 0.001


@dataclass(frozen=True)
class Measured:
    """seconds: in this process. extra_bytes: most private memory beyond what it held before, and shared memory of its
    own, at any time."""

    seconds: float
    extra_bytes: int


def private_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no RssAnon")


class Peak:
    """Samples this process's private memory until it is stopped."""

    def __init__(self) -> None:
        self.start = self.most = private_bytes()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(SAMPLE_S):
            self.most = max(self.most, private_bytes())

    def stop(self) -> int:
        self._end.set()
        self._thread.join()
        return max(self.most, private_bytes()) - self.start


class Rank(Worker):
    """Holds the storages of its rank of a layout, every page of them in memory."""

    def __init__(self, context: Any, layouts: Sequence[Layout]) -> None:
        super().__init__(context)
        torch.set_num_threads(1)
        self.mine = layouts[context.coordinates.rank]
        (rank,) = self.mine.ranks
        self.storages = {name: tensor.fill_(rank + 1) for name, tensor in self.mine.allocate(rank).items()}
        self.measured: dict[str, Measured] = {}

        self.watched = True

    @dispatch("ONE_TO_ALL")
    def watch(self, memory: bool) -> None:
        """Whether memory is sampled from now on; sampling slows what is timed."""
        self.watched = memory

    @contextmanager
    def measure(self, what: str, own_bytes: Callable[[], int] = lambda: 0) -> Any:
        peak = Peak() if self.watched else None
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self.measured[what] = Measured(seconds, 0 if peak is None else peak.stop() + own_bytes())

    @dispatch("ONE_TO_ALL")
    def found(self, what: str) -> Measured:
        return self.measured[what]

    @dispatch("ONE_TO_ALL")
    def layout(self) -> RankLayout:
        return RankLayout.here(self.mine)

    @dispatch("ONE_TO_ALL")
    def join_gloo(self, address: str, first: int, world: int) -> None:
        rank = first + self.context.coordinates.rank
        dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=world)

    def _execute(self, plan: Plan, processes: Processes, source: Any, destination: Any, bucket_bytes: int) -> None:
        dist.barrier()
        with self.measure("gloo"):
            execute(plan, processes, source, destination, bucket_bytes=bucket_bytes)


class TrainingRank(Rank):
    @dispatch("ALL_TO_ALL")
    def take_route(self, outgoing: Outgoing, transport: Transport) -> None:
        self.outgoing, self.transport = outgoing, transport

    @dispatch("ONE_TO_ALL")
    def offer(self) -> Offer:
        with self.measure("offer"):
            return self.transport.offer(self.outgoing, self.storages, self.context.store)

    @dispatch("ONE_TO_ALL")
    def prove(self, probe: list[int]) -> tuple[Checksums, list[float]]:
        with self.measure("prove"):
            return expected_checksums(self.outgoing, self.storages), [0.0]

    @dispatch("ONE_TO_ALL")
    def train(self) -> None:
        for tensor in self.storages.values():
            tensor += 1

    @dispatch("ONE_TO_ALL")
    def save(self, folder: str, flush: bool) -> str:
        """Each rank its own shard, at the same time as the others. flush: to the disk, and out of the page cache."""
        path = f"{folder}/{self.context.coordinates.rank}.safetensors"
        with self.measure("save"):
            save_file(self.storages, path)
            if flush:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return path

    @dispatch("ONE_TO_ALL")
    def gloo(self, plan: Plan, processes: Processes, bucket_bytes: int) -> None:
        self._execute(plan, processes, {self.context.coordinates.rank: self.storages}, {}, bucket_bytes)


def _left_out(digest: object, block: Tensor, dtype: torch.dtype) -> int:
    """In the place of a block's checksum."""
    return block.nbytes


class EngineRank(Rank):
    hashed = True

    @dispatch("ONE_TO_ALL")
    def hash(self, on: bool) -> None:
        """Whether what is received is also proven."""
        self.hashed = on

    @dispatch("ALL_TO_ALL")
    def take_route(self, incoming: tuple[Incoming, ...], transport: Transport) -> None:
        self.incoming, self.transport = incoming, transport

    @dispatch("ONE_TO_ALL")
    def receive(self, delivery: Delivery) -> Receipt:
        checksums: Checksums = {}
        held: list[int] = []
        counted = nullcontext() if self.hashed else patch.object(incoming_module, "_update", _left_out)
        with counted, self.measure("receive", lambda: max(held, default=0)):
            for taken in self.transport.take_in_turn(self.incoming, delivery.offers, self.context.store):
                held.append(sum(memory.nbytes for memory in taken.memory))
                with mapped(taken.publications) as sources:
                    for _, _, sums in assemble(taken.incoming[0], sources, self.storages):
                        checksums |= sums
                del taken, sources
        return Receipt(checksums, [0.0])

    @dispatch("ONE_TO_ALL")
    def trust(self) -> None:
        """Nothing waits for it here."""

    @dispatch("ONE_TO_ALL")
    def copy(self) -> None:
        """A plain copy of as many bytes from this process's own memory, into the same tensors."""
        other = {name: torch.ones_like(tensor) for name, tensor in self.storages.items()}
        with self.measure("copy"):
            for name, tensor in self.storages.items():
                tensor.copy_(other[name])

    @dispatch("ONE_TO_ALL")
    def load(self, paths: list[str]) -> None:
        with self.measure("load"):
            sources: Mapping[int, Mapping[str, Tensor]] = {rank: load_file(path) for rank, path in enumerate(paths)}
            for _, move, into in self._moves():
                out = view(sources[move.source.rank][move.source.storage], move.source, move.shape)
                into.copy_(out)

    def _moves(self) -> Iterator[tuple[int, Move, Tensor]]:
        for filling in self.incoming[0].fillings:
            flat = self.storages[filling.storage.name]
            for row, move in zip(filling.rows, filling.moves, strict=True):
                yield row, move, view(flat, move.destination, move.shape)

    @dispatch("ONE_TO_ALL")
    def gloo(self, plan: Plan, processes: Processes, bucket_bytes: int) -> None:
        rank = self.context.coordinates.rank
        self._execute(plan, processes, {}, {rank: self.storages}, bucket_bytes)

    @dispatch("ONE_TO_ALL")
    def held(self) -> Checksums:
        """Of what lies in this engine's memory now."""
        return {row: checksum(into, into.dtype) for row, _, into in self._moves()}
