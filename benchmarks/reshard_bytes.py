"""Bytes that gloo processes really move to reshard a model, against the plan and the HybridFlow paper's fractions.

    python benchmarks/reshard_bytes.py [--skip-64] [--engines hf vllm] [--skip-table]

(i) One line a case and way of resharding, of a model of tensors that p and t divide: the paper's zero-redundancy
grouping; plain generation groups of neighbours, where the plan still moves only what is missing; plain regrouping as
the paper counts it (every rank gathers its replica's whole model); and gathering everything from ZeRO 3
(DeepSpeed-Chat). Each is executed by one process a rank, into tensors that are then compared with slices of the full
ones. Fractions are of the model, received by the worst rank, and exact.

(ii) Real engines on Ray, from two data ranks of an actor (torch), by both transports (reshard_engines.py): what is
sent, and what the engines' checksums prove to have come, against the sum of the shards that the engines' own loaders
ask for.

Exits with 1 where a fraction, a tensor or a byte count is not what it must be; ends with `ratio <bytes moved / bytes of
the paper's formula, or of the shards>` over the zero-redundancy cases and the engines.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hybridflow.resharding.cuts import Even
from hybridflow.resharding.grouping import Regrouping
from hybridflow.resharding.layout import Layout, Parameter
from hybridflow.resharding.plan import Plan, make_plan, validate
from hybridflow.resharding.shards import Mesh, Spec, Zero, build_layout, grid
from hybridflow.resharding.sources import colocated
from hybridflow.resharding.transfer import Processes, execute

# (p, t, d, p_g, t_g) and the fraction that the paper's zero-redundancy grouping must move, as a literal.
CASES = {
    (1, 4, 2, 1, 2): Fraction(1, 4),
    (1, 8, 2, 1, 2): Fraction(3, 8),
    (1, 8, 2, 1, 4): Fraction(1, 8),
    (1, 8, 2, 1, 8): Fraction(0),
    (2, 4, 1, 1, 4): Fraction(1, 8),
    (2, 4, 2, 1, 2): Fraction(3, 8),
    (2, 4, 1, 2, 2): Fraction(1, 8),
    (4, 8, 1, 1, 8): Fraction(3, 32),
    (8, 8, 1, 1, 8): Fraction(7, 64),
}
NUM_LAYERS, WIDTH = 8, 64
BUCKET_BYTES = 1 << 14


@dataclass(frozen=True)
class Way:
    """One way of resharding. expected: the worst rank's fraction of the model, exact."""

    name: str
    source: Layout
    destination: Layout
    expected: Fraction


def specs(cut: bool) -> list[Spec]:
    """One matrix cut by rows and one by columns a layer; or both whole."""
    return [
        Spec(Parameter(f"layers.{layer}.{name}", (WIDTH, WIDTH)), layer, (Even(dim),) if cut else ())
        for layer in range(NUM_LAYERS)
        for name, dim in (("up", 0), ("down", 1))
    ]


def ways(p: int, t: int, d: int, p_g: int, t_g: int) -> Iterator[Way]:
    rule = Regrouping(p, t, d, p_g, t_g)
    training = build_layout(specs(True), grid(p, t, d))
    everywhere = build_layout(specs(False), grid(1, 1, p * t * d))
    zero3 = build_layout(specs(False), grid(1, 1, p * t * d), Zero(3))
    neighbours = Regrouping(p, t, d, p_g, t_g, rule="plain").generation_mesh()
    yield Way(
        "zero-redundancy",
        training,
        build_layout(specs(True), rule.generation_mesh()),
        rule.zero_redundancy_fractions().communication,
    )
    yield Way(
        "plain groups, minimal plan",
        training,
        build_layout(specs(True), neighbours),
        missing_of_neighbours(rule, neighbours),
    )
    yield Way("plain regrouping", training, everywhere, rule.plain_fractions().communication)
    yield Way("gather everything", zero3, everywhere, rule.gather_everything_fractions().communication)


def missing_of_neighbours(rule: Regrouping, neighbours: Mesh) -> Fraction:
    """The worst rank's need: its generation shard, less the part that its training shard overlaps."""
    p, t, p_g, t_g = rule.pipeline, rule.tensor, rule.generation_pipeline, rule.generation_tensor

    def needs(rank: int) -> Fraction:
        place = neighbours.places[rank]
        inside = rank % t * t_g // t == place.tensor and rank // t % p * p_g // p == place.pipeline
        return Fraction(1, p_g * t_g) - (Fraction(1, p * t) if inside else 0)

    return max(needs(rank) for rank in range(p * t))


def numbered(layout: Layout, rank: int) -> dict[str, torch.Tensor]:
    """This rank's storages, every element its own number in the model (exact in float32); padding is 0."""
    tensors = layout.allocate(rank)
    pieces, first = layout.pieces, [0]
    for parameter in layout.parameters:
        first.append(first[-1] + parameter.num_elements)
    for row in (pieces.rank == rank).nonzero()[0].tolist():
        index = pieces.parameter[row]
        (a, b, c), (x, y, z) = pieces.low[row].tolist(), pieces.high[row].tolist()
        shape = layout.parameters[index].shape
        full = torch.arange(first[index] + 1, first[index + 1] + 1, dtype=torch.float32).view(*shape, 1)
        storage = tensors[layout.storages[pieces.storage[row]].name]
        part = storage.as_strided((x - a, y - b, z - c), pieces.strides[row].tolist(), int(pieces.offset[row]))
        part.copy_(full[a:x, b:y, c:z])
    return tensors


def run_rank(rank: int, folder: str, plans: list[Plan]) -> None:
    """Executes every plan of a case in one process group; leaves (bytes received, bytes sent, buffer bytes, equal)
    of each."""
    torch.set_num_threads(1)
    world = len(plans[0].source.ranks)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    processes = Processes({r: r for r in range(world)}, {r: r for r in range(world)})
    found = []
    for plan in plans:
        source = {rank: numbered(plan.source, rank)}
        into = {rank: {name: torch.full_like(t, -1) for name, t in plan.destination.allocate(rank).items()}}
        report = execute(plan, processes, source, into, bucket_bytes=BUCKET_BYTES)
        expected = numbered(plan.destination, rank)
        equal = all(torch.equal(into[rank][name], tensor) for name, tensor in expected.items())
        found.append((report.bytes_received, report.bytes_sent, report.buffer_bytes, equal))
    torch.save(found, f"{folder}/result{rank}")
    dist.barrier()
    dist.destroy_process_group()


def measure(plans: list[Plan]) -> list[list[tuple[int, int, int, bool]]]:
    """[way][rank] of what `run_rank` found."""
    world = len(plans[0].source.ranks)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(run_rank, (folder, plans), nprocs=world, start_method="fork")
        ranks = [torch.load(f"{folder}/result{rank}") for rank in range(world)]
    return [list(way) for way in zip(*ranks, strict=True)]


def report(case: tuple[int, ...], literal: Fraction) -> tuple[bool, int, Fraction]:
    """Prints the four lines of a case: (all exact, bytes moved and paper's bytes of the zero-redundancy way)."""
    p, t, d, p_g, t_g = case
    every = list(ways(*case))
    plans = [make_plan(way.source, way.destination, colocated(way.source.ranks)) for way in every]
    for plan in plans:
        validate(plan)
    began = time.perf_counter()
    measured = measure(plans)
    print(f"{p}-{t}-{d} -> p_g {p_g} t_g {t_g}: {p * t * d} processes, {time.perf_counter() - began:.1f} s")
    good = every[0].expected == literal
    for way, plan, ranks in zip(every, plans, measured, strict=True):
        moved, sent = sum(rank[0] for rank in ranks), sum(rank[1] for rank in ranks)
        model = plan.source.num_bytes
        worst = Fraction(max(rank[0] for rank in ranks), model)
        exact = (
            worst == way.expected
            and moved == sent == plan.total_bytes
            and [rank[0] for rank in ranks] == [plan.bytes_received[r] for r in range(len(ranks))]
            and max(rank[2] for rank in ranks) <= BUCKET_BYTES
            and all(rank[3] for rank in ranks)
        )
        good = good and exact
        print(
            f"  {way.name:<27} moved {moved:>10,} B  plan {plan.total_bytes:>10,} B  worst rank {worst!s:>6}"
            f"  expected {way.expected!s:>6}  peak {peak(plan)!s:>6}  {'exact' if exact else 'WRONG'}",
            flush=True,
        )
    return good, sum(rank[0] for rank in measured[0]), literal * plans[0].source.num_bytes * p * t * d


def peak(plan: Plan) -> Fraction:
    """Largest share of the model that a rank holds for generation."""
    return Fraction(max(plan.destination.bytes_per_rank().values()), plan.source.num_bytes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-64", action="store_true", help="leave out the case of 64 processes")
    parser.add_argument("--skip-table", action="store_true", help="leave out (i)")
    parser.add_argument("--engines", nargs="*", choices=("hf", "vllm"), default=["hf", "vllm"], help="of (ii)")
    arguments = parser.parse_args()
    good, moved, formula = True, 0, Fraction(0)
    for case, literal in () if arguments.skip_table else CASES.items():
        if arguments.skip_64 and case[0] * case[1] * case[2] > 32:
            continue
        exact, case_moved, case_formula = report(case, literal)
        good, moved, formula = good and exact, moved + case_moved, formula + case_formula
    if arguments.engines:
        from reshard_engines import into_engines

        exact, engines_moved, shards = into_engines(arguments.engines)
        good, moved, formula = good and exact, moved + engines_moved, formula + shards
    print(f"ratio {float(moved / formula) if formula else 1.0:.6f}")
    return 0 if good and moved == formula else 1


if __name__ == "__main__":
    sys.exit(main())
