"""Seconds and GB/s of each way that weights take from two training ranks to one and to two engines, on one node.

    python benchmarks/reshard_speed.py [--sizes 3M 100M 500M] [--engines 1 2] [--rounds 5] [--bucket-mib 64]

Two tensor ranks of a dense decoder in float32, engines that want it whole; each rank a Ray actor of one thread. The
engines are their memory alone: what a real one's own reload adds is measured by `reshard_reload.py`.

  memory copy        each engine's process copies as many bytes from its own memory: the limit
  published memory   the engine maps the trainer's memory and copies its slices
  with checksums     the same, and each block's checksum, as every sync does
  gloo               `transfer.execute` in buckets, over the loop-back device
  object store       packed into buckets, put, fetched, copied, checksums included
  disk               each training rank saves its shard as safetensors, flushed; engines load and copy their slices
  page cache         the same, but nothing is flushed: the disk is never waited for, the bytes never leave memory
  sync               published memory from end to end: offer, checksums of both sides, proofs, all calls

*Colocated* and *split* differ, for CPU processes on one node, in the pool that the engines are in, and so in what runs
beside what. Seconds are the best of the rounds, of the slowest rank. `extra` is the most private memory that a process
needed beyond what it held, and shared memory of its own. Exits with 1 where an engine holds other weights after a route
than the trainer, where colocated published memory is below half the speed of the copy, or sync less than 3 times as
fast as the disk; the smallest size is printed and not judged, since there calls cost more than bytes. Ends with
`ratio <least colocated share of the copy's speed / 0.5>`.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from reshard_ranks import EngineRank, TrainingRank

from hybridflow.controller.coordinates import Shape
from hybridflow.controller.group import joint
from hybridflow.controller.ray_runtime import RayRuntime
from hybridflow.resharding.decoder import Decoder, decoder_specs
from hybridflow.resharding.layout import renumbered
from hybridflow.resharding.shards import build_layout, grid
from hybridflow.resharding.transfer import Processes
from hybridflow.resharding.transport import Delivery, ThroughStore, Transport
from hybridflow.schedule.policy_sync import PolicySync

SIZES = {
    "3M": Decoder(512, 256, 768, 4, 4, 2, 64),
    "100M": Decoder(16384, 768, 2048, 12, 12, 4, 64),
    "500M": Decoder(32000, 1280, 3456, 24, 20, 4, 64),
}
JUDGED = ("100M", "500M")
LEAST_SHARE, LEAST_TIMES = 0.5, 3.0


@dataclass(frozen=True)
class Line:
    """seconds: of the slowest rank. extra: MiB, of the training and the engine rank that needed most."""

    seconds: float
    extra: tuple[float, float] = (0.0, 0.0)


class Bench:
    """One size, number of engines and placement: groups on a Ray cluster, and their plan."""

    def __init__(self, runtime: RayRuntime, model: Decoder, engines: int, placement: str, bucket_bytes: int) -> None:
        self.bucket_bytes, self.placement = bucket_bytes, placement
        source = [build_layout(decoder_specs(model), grid(tensor=2))]
        whole = build_layout(decoder_specs(model), grid())
        first = runtime.pool("train", 2, cpus_per_bundle=0.5, max_groups=2)
        second = first if placement == "colocated" else runtime.pool("engines", engines, cpus_per_bundle=0.5)
        layouts = [_only(source[0], rank) for rank in (0, 1)]
        self.trainer = runtime.group("trainer", partial(TrainingRank, layouts=layouts), first, Shape(tensor=2))
        self.engine = runtime.group(
            "engine", partial(EngineRank, layouts=[renumbered(whole, 0)] * engines), second, Shape(data=engines)
        )
        runtime.ready([self.trainer, self.engine])
        self.policy = PolicySync(self.trainer, self.engine, [1], 1e-4, bucket_bytes)
        self.plan = self.policy.route().plan
        self.num_bytes = self.plan.total_bytes
        with tempfile.NamedTemporaryFile(delete=False) as store:
            world = 2 + engines
        os.unlink(store.name)
        joint(
            self.trainer.bind("join_gloo", store.name, 0, world), self.engine.bind("join_gloo", store.name, 2, world)
        ).result()
        self.processes = Processes({0: 0, 1: 1}, {rank: 2 + rank for rank in range(engines)})

    def slowest(self, group: Any, *whats: str) -> float:
        return sum(max(found.seconds for found in group.found(what).result()) for what in whats)

    def extra(self, group: Any, *whats: str) -> float:
        return max(found.extra_bytes for what in whats for found in group.found(what).result()) / 2**20

    def copy(self) -> Line:
        self.engine.copy().result()
        return Line(self.slowest(self.engine, "copy"))

    def synced(self) -> Line:
        """The whole of a sync."""
        self.trainer.train().result()
        began = time.perf_counter()
        self.policy.sync()
        seconds = time.perf_counter() - began
        return Line(seconds, (self.extra(self.trainer, "offer", "prove"), self.extra(self.engine, "receive")))

    def transported(self) -> Line:
        """Of a sync what moves the weights, alone: offer and receive."""
        self.trainer.train().result()
        self.policy.use(self.policy.route())
        offers = self.trainer.offer().result()
        self.engine.receive(Delivery(1, tuple(offers), (1,))).result()
        seconds = self.slowest(self.trainer, "offer") + self.slowest(self.engine, "receive")
        return Line(seconds, (self.extra(self.trainer, "offer"), self.extra(self.engine, "receive")))

    def watch(self, memory: bool) -> None:
        self.trainer.watch(memory).result()
        self.engine.watch(memory).result()

    def gloo(self) -> Line:
        arguments = (self.plan, self.processes, self.bucket_bytes)
        joint(self.trainer.bind("gloo", *arguments), self.engine.bind("gloo", *arguments)).result()
        seconds = max(self.slowest(self.trainer, "gloo"), self.slowest(self.engine, "gloo"))
        return Line(seconds, (self.extra(self.trainer, "gloo"), self.extra(self.engine, "gloo")))

    def disk(self, flush: bool) -> Line:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            began = time.perf_counter()
            paths = self.trainer.save(folder, flush).result()
            self.engine.load(paths).result()
            seconds = time.perf_counter() - began
        return Line(seconds, (self.extra(self.trainer, "save"), self.extra(self.engine, "load")))

    def through(self, transport: Transport) -> None:
        self.policy.through(transport)
        self.policy.use(self.policy.route())

    def refuse_other_weights(self, name: str) -> None:
        """Of every element in every engine's memory."""
        sent = {row: found for sums, _ in self.trainer.prove([1]).result() for row, found in sums.items()}
        held = {row: found for sums in self.engine.held().result() for row, found in sums.items()}
        if held != sent:
            raise SystemExit(f"{name}: the engines do not hold the trainer's weights")


def _only(layout: Any, rank: int) -> Any:
    """What this rank alone describes."""
    from numpy import nonzero, searchsorted

    mine = [index for index, storage in enumerate(layout.storages) if storage.rank == rank]
    rows = nonzero(layout.pieces.rank == rank)[0]
    columns = {name: getattr(layout.pieces, name)[rows] for name in type(layout.pieces).__annotations__}
    columns["storage"] = searchsorted(mine, columns["storage"])
    storages = tuple(layout.storages[index] for index in mine)
    return type(layout)(layout.parameters, storages, type(layout.pieces)(**columns), (rank,))


def best(bench: Bench, rounds: int, run: Callable[[], Line]) -> Line:
    """The fastest of the rounds, and the memory of one before them."""
    bench.watch(True)
    extra = run().extra
    bench.watch(False)
    return Line(min(run().seconds for _ in range(rounds)), extra)


def measured(bench: Bench, rounds: int) -> dict[str, Line]:
    lines = {"published, first time": bench.transported(), "memory copy": best(bench, rounds, bench.copy)}
    bench.engine.hash(False).result()
    lines["published memory"] = best(bench, rounds, bench.transported)
    bench.engine.hash(True).result()
    lines["with checksums"] = best(bench, rounds, bench.transported)
    lines["sync"] = best(bench, rounds, bench.synced)
    bench.refuse_other_weights("published memory")
    memory = bench.policy.route().transport
    for name, run in {
        "gloo": bench.gloo,
        "object store": bench.transported,
        "disk": partial(bench.disk, True),
        "page cache": partial(bench.disk, False),
    }.items():
        bench.through(ThroughStore(bench.bucket_bytes) if name == "object store" else memory)
        bench.trainer.train().result()
        lines[name] = best(bench, rounds, run)
        bench.refuse_other_weights(name)
    return lines


def report(bench: Bench, label: str, rounds: int, judged: bool) -> tuple[bool, float]:
    """Prints the lines of one bench; whether the limits are kept, and the share of the copy."""
    lines = measured(bench, rounds)
    print(f"{label}: {bench.num_bytes / 1e6:,.0f} MB", flush=True)
    for name, line in lines.items():
        extra = f"   extra MiB: trainer {line.extra[0]:7.1f}, engine {line.extra[1]:7.1f}" if any(line.extra) else ""
        print(f"  {name:<22}{line.seconds:9.4f} s {bench.num_bytes / line.seconds / 1e9:8.2f} GB/s{extra}", flush=True)
    share, proven = (
        lines["memory copy"].seconds / lines[name].seconds for name in ("published memory", "with checksums")
    )
    times, cached = (lines[name].seconds / lines["sync"].seconds for name in ("disk", "page cache"))
    print(
        f"  published memory at {share:.2f} of the copy's speed, {proven:.2f} with checksums; "
        f"sync {times:.1f} times as fast as the disk route, {cached:.1f} times as fast as the page cache",
        flush=True,
    )
    slow = bench.placement == "colocated" and share < LEAST_SHARE
    return not judged or (not slow and times >= LEAST_TIMES), share


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--engines", nargs="*", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--placements", nargs="*", choices=("colocated", "split"), default=["colocated", "split"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bucket-mib", type=int, default=64)
    options = parser.parse_args()
    good, least = True, float("inf")
    with tempfile.TemporaryDirectory(prefix="reshard-speed-") as folder:
        for size in options.sizes:
            for engines in options.engines:
                for placement in options.placements:
                    runtime = RayRuntime(Path(folder) / f"{size}-{engines}-{placement}", num_cpus=8)
                    try:
                        bench = Bench(runtime, SIZES[size], engines, placement, options.bucket_mib << 20)
                        label = f"{size}, 2 tensor ranks to {engines} engine{'s' if engines > 1 else ''}, {placement}"
                        kept, share = report(bench, label, options.rounds, size in JUDGED)
                    finally:
                        runtime.shutdown()
                    good = good and kept
                    if placement == "colocated" and (size in JUDGED or options.sizes == [size]):
                        least = min(least, share)
    print(f"ratio {least / LEAST_SHARE:.2f}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
