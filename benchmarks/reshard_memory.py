"""Peak extra memory of every process during a sync: training ranks, the engine's host, and vLLM's own processes.

    python benchmarks/reshard_memory.py [--cases 1-1-2:1:1 ...] [--transports published store] [--syncs 6]

The real thing: a DeepSpeed actor on Ray, vLLM engines, `PolicySync`; a Qwen2 of 56 million float32 parameters (214 MiB)
with random weights, an optimizer step before every sync. Each process's private memory (RssAnon) and shared memory of
its own making (blocks of `/dev/shm/torch_<its pid>_*`) are sampled from outside every few milliseconds.

An engine's processes: the most above what they held before the first sync, over the `first` and the `later` ones, and
what is `left` of it at the end. A training rank: the most above what it held before, while it offers its weights and
computes their checksums; beside it the whole sync, which runs the model on the probe (ZeRO 3 gathers weights for that),
and the `route`: weights are moved into shared memory once, before the first optimizer step.

Bars: a bucket and 10 % in a training rank and in the engine's host; in vLLM's processes twice the largest layer more.
The object store's own memory is the node's: all that is sent lies there once. Exits with 1 where a bar is missed; ends
with `ratio <least bar / extra>`.
"""

import argparse
import os
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from algorithms.losses import SupervisedLoss
from hybridflow.batch import Batch, Ragged
from hybridflow.batch_ref import BatchRef
from hybridflow.controller.coordinates import Shape
from hybridflow.controller.dispatch import dispatch
from hybridflow.controller.ray_runtime import RayRuntime
from hybridflow.resharding.incoming import expected_checksums
from hybridflow.resharding.transport import PublishedMemory, ThroughStore, Transport
from hybridflow.schedule.policy_sync import PolicySync
from workers.actor import ActorWorker
from workers.generation.settings import RolloutSettings
from workers.rollout import RolloutWorker
from workers.training.settings import EngineSettings

MIB = 1 << 20
SAMPLE_S = 0.002
SIZES = {
    "vocab_size": 16384, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip
LARGEST_LAYER = 16384 * 512 * 4
PROBE = list(range(2, 34))


@dataclass(frozen=True)
class Case:
    """training: p-t-d. tensor: t_g of the one engine."""

    training: str
    zero_stage: int
    tensor: int

    @property
    def name(self) -> str:
        return f"{self.training}:{self.zero_stage}:{self.tensor}"

    @property
    def shape(self) -> Shape:
        pipeline, tensor, data = map(int, self.training.split("-"))
        return Shape(pipeline=pipeline, tensor=tensor, data=data)


CASES = {case.name: case for case in (Case("1-1-2", 1, 1), Case("1-2-1", 0, 2), Case("1-1-2", 3, 2))}


class Actor(ActorWorker):
    @dispatch("ONE_TO_ALL")
    def pid(self) -> int:
        return os.getpid()

    @dispatch("ONE_TO_ALL")
    def checksums(self) -> None:
        expected_checksums(self._outgoing, self._offered)


class Rollout(RolloutWorker):
    @dispatch("ONE_TO_ALL")
    def pid(self) -> int:
        return os.getpid()


def held_bytes(pid: int) -> int:
    """Private memory, and shared memory that this process made."""
    status = Path(f"/proc/{pid}/status").read_text()
    anonymous = int(status.partition("RssAnon:")[2].split(maxsplit=1)[0]) << 10
    return anonymous + _shared_bytes(pid)


def _shared_bytes(pid: int) -> int:
    found: dict[int, int] = {}
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            if os.readlink(entry.path).startswith(f"/dev/shm/torch_{pid}_"):
                stat = os.stat(entry.path)
                found[stat.st_ino] = stat.st_blocks * 512
        except FileNotFoundError:
            continue  # closed meanwhile
    return sum(found.values())


def vllm_processes(host: int) -> dict[str, int]:
    """The engine's own processes by name."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(folder.name))
    found, waiting = dict[str, int](), [host]
    while waiting:
        for child in parents.get(waiting.pop(), []):
            waiting.append(child)
            name = Path(f"/proc/{child}/cmdline").read_text().partition("\0")[0]
            if name.startswith("VLLM"):
                found[f"{name} {len(found)}"] = child
    return found


class Peaks:
    """Most memory of each process while the block runs, and what it held at its start."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids, self._end = pids, threading.Event()

    def __enter__(self) -> "Peaks":
        self.start = {name: held_bytes(pid) for name, pid in self._pids.items()}
        self.most = dict(self.start)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._end.wait(SAMPLE_S):
            for name, pid in self._pids.items():
                self.most[name] = max(self.most[name], held_bytes(pid))

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        self.end = {name: held_bytes(pid) for name, pid in self._pids.items()}

    def extra(self, name: str) -> int:
        return self.most[name] - self.start[name]


class Bench:
    def __init__(self, runtime: RayRuntime, model: str, case: Case, bucket_bytes: int) -> None:
        self.runtime, self.bucket_bytes = runtime, bucket_bytes
        settings = EngineSettings.model_validate({"zero_stage": case.zero_stage, "threads": 1})
        actor: Any = partial(Actor, model_folder=model, settings=settings)
        chosen = RolloutSettings(tensor_parallel_size=case.tensor, kv_cache_gib=0.05, max_num_seqs=8)
        rollout: Any = partial(Rollout, model_folder=model, settings=chosen, tokenizer="char")
        train = runtime.pool("train", case.shape.num_ranks, cpus_per_bundle=0.5)
        engines = runtime.pool("engines", case.tensor, cpus_per_bundle=0.5)
        self.actor = runtime.group("actor", actor, train, case.shape)
        self.rollout = runtime.group("rollout", rollout, engines, Shape(), bundles_per_rank=case.tensor)
        runtime.ready([self.actor, self.rollout])
        self.policy = PolicySync(self.actor, self.rollout, PROBE, 1e-3, bucket_bytes)
        self.trainers = {f"training rank {rank}": pid for rank, pid in enumerate(self.actor.pid().result())}
        (host,) = self.rollout.pid().result()
        self.engine = {"engine's host": host, **vllm_processes(host)}

    def update(self) -> None:
        lengths = torch.full((4,), 32)
        mask = (torch.arange(32) > 0).repeat(4)
        tokens = torch.randint(0, SIZES["vocab_size"], (128,))
        rows = {"tokens": Ragged(tokens, lengths), "response_mask": Ragged(mask, lengths)}
        batch = Batch({**rows, "loss_weight": torch.full((4,), 1 / 124, dtype=torch.float64)})
        self.actor.update(BatchRef.put(batch, self.runtime.store), SupervisedLoss()).result()

    def route_made(self, transport: Transport) -> Peaks:
        self.policy.through(transport)
        with Peaks(self.trainers) as peaks:
            self.policy.use(self.policy.route())
        return peaks

    def sent(self) -> Peaks:
        """Offered, and the checksums computed; the trainer's pass over the probe left out."""
        with Peaks(self.trainers) as peaks:
            self.actor.offer().result()
            self.actor.checksums().result()
        return peaks

    def synced(self) -> Peaks:
        with Peaks(self.trainers | self.engine) as peaks:
            self.policy.sync()
        return peaks

    def bar(self, name: str) -> float:
        return 1.1 * self.bucket_bytes + (2 * LARGEST_LAYER if name.startswith("VLLM") else 0)


def report(bench: Bench, label: str, transport: Transport, num_syncs: int) -> float:
    """Prints a line a process; the least bar over extra."""
    prepared = bench.route_made(transport)
    found: list[tuple[Peaks, Peaks]] = []
    for _ in range(num_syncs):
        bench.update()
        found.append((bench.sent(), bench.synced()))
    least, start = float("inf"), found[0][1].start
    for name in bench.trainers | bench.engine:
        if name in bench.trainers:
            extra = [sent.extra(name) for sent, _ in found]
            whole = max(synced.extra(name) for _, synced in found)
            beside = f"with the model's forward pass {whole / MIB:6.1f}, route {prepared.extra(name) / MIB:6.1f}"
        else:
            extra = [synced.most[name] - start[name] for _, synced in found]
            beside = f"left {(found[-1][1].end[name] - start[name]) / MIB:5.1f}"
        share = bench.bar(name) / max(*extra, 1)
        least = min(least, share)
        print(
            f"{label:<20} {name:<20} first {extra[0] / MIB:5.1f}  later {max(extra[1:]) / MIB:5.1f}  bar "
            f"{bench.bar(name) / MIB:5.1f} MiB  {beside}{'  MISSED' if share < 1 else ''}",
            flush=True,
        )
    return least


def write_model(folder: Path) -> str:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(eos_token_id=1, tie_word_embeddings=False, **SIZES)).save_pretrained(folder)
    return str(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="p-t-d:zero:t_g")
    parser.add_argument("--transports", nargs="+", choices=("published", "store"), default=["published", "store"])
    parser.add_argument("--bucket-mib", type=int, default=32)
    parser.add_argument("--syncs", type=int, default=6)
    options = parser.parse_args()
    bucket = options.bucket_mib << 20
    known: dict[str, Transport] = {"published": PublishedMemory(), "store": ThroughStore(bucket)}
    least = float("inf")
    with tempfile.TemporaryDirectory(prefix="reshard-memory-") as folder:
        model = write_model(Path(folder) / "model")
        for name in options.cases:
            for transport in options.transports:  # each in new processes, since a first sync is told apart
                runtime = RayRuntime(Path(folder) / f"{name}-{transport}".replace(":", "-"), num_cpus=8)
                try:
                    bench = Bench(runtime, model, CASES[name], bucket)
                    least = min(least, report(bench, f"{name} {transport}", known[transport], options.syncs))
                finally:
                    runtime.shutdown()
    print(f"ratio {least:.2f}")
    return 0 if least >= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
