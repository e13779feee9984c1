"""Plans executed by real gloo processes: the same tensors as slicing the full ones, and the plan's bytes."""

import itertools
from dataclasses import replace

import gloo_ranks
import pytest
import torch
import torch.multiprocessing as mp
from by_slicing import local_tensors, numbered

from hybridflow.errors import WeightSyncError
from hybridflow.resharding.buckets import cut_moves
from hybridflow.resharding.cuts import Even
from hybridflow.resharding.decoder import Decoder, EngineCuts, decoder_specs
from hybridflow.resharding.layout import Parameter, dtype_of
from hybridflow.resharding.plan import make_plan
from hybridflow.resharding.shards import Spec, Zero, build_layout, grid
from hybridflow.resharding.sources import colocated
from hybridflow.resharding.transfer import Processes, _by_peer, execute_here

DENSE = Decoder(37, 16, 24, 2, 4, 2, 4, qkv_bias=True)
SPARSE = Decoder(37, 16, 8, 2, 4, 2, 4, num_experts=4, dtype="bfloat16")
VLLM = EngineCuts(64, fused=True)


def start_ranks(world, folder, body, arguments, join=True):
    """Real processes. The fork server imports torch once for all tests of this folder."""
    mp.get_context("forkserver").set_forkserver_preload(["torch.distributed", "torch.multiprocessing"])
    everything = (world, str(folder), body, arguments)
    return mp.start_processes(gloo_ranks.joined, everything, nprocs=world, join=join, start_method="forkserver")


def run_ranks(world, folder, body, *arguments):
    start_ranks(world, folder, body, arguments)
    return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(world)]


@pytest.mark.parametrize(
    ("model", "source", "zero", "destination", "split"),
    [
        (DENSE, grid(1, 2, 2), Zero(1), grid(1, 4, 1), False),
        (DENSE, grid(2, 1, 1), Zero(0), grid(1, 2, 1), True),
        (SPARSE, grid(1, 1, 3, 1), Zero(3), grid(1, 1, 2, 2), False),
    ],
    ids=["zero1 t2 d2 -> t4, colocated", "p2 -> t2, split", "zero3 d3 -> experts over 2, colocated"],
)
def test_processes_hold_what_slicing_gives(tmp_path, model, source, zero, destination, split):
    from_specs, to_specs = decoder_specs(model), decoder_specs(model, VLLM)
    one, other = build_layout(from_specs, source, zero), build_layout(to_specs, destination)
    world = len(one.ranks) + len(other.ranks) if split else len(one.ranks)
    shift = len(one.ranks) if split else 0
    processes = Processes({rank: rank for rank in one.ranks}, {rank: rank + shift for rank in other.ranks})
    plan = make_plan(one, other) if split else make_plan(one, other, colocated(other.ranks))
    full = numbered(one.parameters)
    held = local_tensors(full, from_specs, source, zero, [s * 2 // source.pipeline for s in range(source.pipeline + 1)])
    expected = local_tensors(full, to_specs, destination, Zero(), (0, 2))

    results = run_ranks(world, tmp_path, gloo_ranks.move, plan, processes, held, 1000)

    found = {rank: tensors for into, _ in results for rank, tensors in into.items()}
    assert found.keys() == expected.keys()
    for rank, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(found[rank][name], tensor), (rank, name)
    for process, (_, report) in enumerate(results):
        assert report.bytes_sent == plan.bytes_sent.get(process, 0)
        assert report.bytes_received == plan.bytes_received.get(process - shift, 0)
        assert report.buffer_bytes <= 1000
    assert sum(report.bytes_sent for _, report in results) == plan.total_bytes > 0


def test_peak_memory_grows_by_one_bucket_at_most(tmp_path):
    """Two ranks swap halves of 64 MiB in buckets of 8 MiB. 1 MiB for the moves themselves."""
    bucket = 8 << 20
    spec = [Spec(Parameter("w", (4096, 4096)), "every", (Even(dim),)) for dim in (0, 1)]
    plan = make_plan(build_layout(spec[:1], grid(1, 2)), build_layout(spec[1:], grid(1, 2)), colocated((0, 1)))
    assert plan.total_bytes == 32 << 20
    same = {0: 0, 1: 1}
    growth = run_ranks(2, tmp_path, gloo_ranks.peak_growth, plan, Processes(same, same), bucket)
    assert max(growth) <= 1.1 * bucket + (1 << 20)
    assert max(growth) >= bucket // 2  # the measurement sees buffers at all


@pytest.mark.parametrize("how", ["late", "dead"])
def test_a_process_that_is_not_there_is_named_within_the_deadline(tmp_path, how):
    spec = [Spec(Parameter("w", (8, 8)), "every", (Even(dim),)) for dim in (0, 1)]
    plan = make_plan(build_layout(spec[:1], grid(1, 2)), build_layout(spec[1:], grid(1, 2)), colocated((0, 1)))
    processes, held = Processes({0: 0, 1: 1}, {0: 0, 1: 1}), {0: {"w": torch.ones(32)}}
    body = (plan, processes, held, str(tmp_path), how)
    context = start_ranks(2, tmp_path, gloo_ranks.absent, body, join=False)
    for process in context.processes:
        process.join(60)
    said = (tmp_path / "said").read_text()
    assert "process 1 did not pass within 0.5 s" in said and "needs a new process group" in said
    assert float(said.split(" ")[0]) < 2.5


@pytest.fixture
def swap():
    spec = [Spec(Parameter("w", (8, 8)), "every", (Even(dim),)) for dim in (0, 1)]
    one, other = build_layout(spec[:1], grid(1, 2)), build_layout(spec[1:], grid(1, 2))
    held = {rank: {"w": torch.arange(32.0) + 32 * rank} for rank in (0, 1)}
    return make_plan(one, other, colocated((0, 1))), held, {rank: other.allocate(rank) for rank in (0, 1)}


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda t: t[:31],
            "source rank 1, w: 31 elements of torch.float32; the layout has 32 contiguous ones of float32",
        ),
        (lambda t: t.double(), "source rank 1, w: 32 elements of torch.float64"),
        (lambda t: t.view(8, 4).t(), "source rank 1, w: 32 elements of torch.float32, not contiguous"),
        (lambda t: None, "source rank 1, w: the layout has it, the rank does not"),
    ],
)
def test_a_tensor_that_is_not_the_layouts_is_refused_before_anything_moves(swap, harm, message):
    plan, held, into = swap
    held[1] = {"w": harm(held[1]["w"])} if harm(held[1]["w"]) is not None else {}
    with pytest.raises(WeightSyncError, match=message):
        execute_here(plan, held, into)
    assert not into[0]["w"].any()


def test_a_destination_in_a_source_tensors_memory_is_refused_unless_nothing_changes(swap):
    plan, held, into = swap
    with pytest.raises(WeightSyncError, match="destination rank 1, w: its memory is a source tensor's"):
        execute_here(plan, held, {0: into[0], 1: held[1]})
    still = make_plan(plan.source, plan.source, colocated((0, 1)))
    before = held[1]["w"].clone()
    execute_here(still, held, held)
    assert torch.equal(held[1]["w"], before)


def one_process(plan, held, into, processes, bucket_bytes=64):
    """A group of one: enough for what is refused before the first message."""
    import torch.distributed as dist

    from hybridflow.resharding.transfer import execute

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return execute(plan, processes, held, into, bucket_bytes=bucket_bytes)
    finally:
        dist.destroy_process_group()


def test_a_plan_for_other_processes_is_refused(swap):
    plan, held, into = swap
    with pytest.raises(WeightSyncError, match="source rank 0 and destination rank 1 are planned as apart, and live in"):
        one_process(plan, held, into, Processes({0: 0, 1: 0}, {0: 0, 1: 0}))
    with pytest.raises(WeightSyncError, match=r"source ranks \[1\] have no process among the 1 of this group"):
        one_process(plan, held, into, Processes({0: 0, 1: 1}, {0: 0, 1: 0}))
    with pytest.raises(WeightSyncError, match=r"destination ranks \[1\] have no process"):
        one_process(plan, held, into, Processes({0: 0, 1: 0}, {0: 0}))
    with pytest.raises(WeightSyncError, match="bucket of 8 bytes; at least 64"):
        one_process(plan, held, into, Processes({0: 0, 1: 0}, {0: 0, 1: 0}), bucket_bytes=8)


def test_ranks_of_one_process_copy_without_messages(swap):
    plan, held, into = swap
    together = replace(colocated(()), shared={0: (0, 1), 1: (0, 1)})
    plan = make_plan(plan.source, plan.destination, together)
    report = one_process(plan, held, into, Processes({0: 0, 1: 0}, {0: 0, 1: 0}))
    assert (report.bytes_sent, report.bytes_stayed, report.num_messages) == (0, 256, 0)
    assert torch.equal(into[1]["w"].view(8, 4), torch.arange(64.0).view(8, 8)[:, 4:])


@pytest.mark.parametrize("capacity", [32, 48, 1 << 10])
def test_buckets_are_full_and_hold_every_byte_once(swap, capacity):
    plan, _, _ = swap
    moves = plan.as_moves(plan.moves)
    buckets = list(cut_moves(moves, capacity))
    assert sum(part.num_bytes for parts in buckets for part in parts) == plan.total_bytes
    assert all(sum(part.num_bytes for part in parts) == capacity for parts in buckets[:-1])


def test_mixed_dtypes_are_packed_without_gaps_and_aligned():
    """An odd number of bytes comes before a float32 in the model, and after it in the bucket."""
    dtypes = {"a": "int8", "b": "float32", "c": "bfloat16"}
    specs = [Spec(Parameter(name, (3, 3), dtype)) for name, dtype in dtypes.items()]
    layout = build_layout(specs, grid())
    plan = make_plan(layout, layout)
    (moves,) = _by_peer(plan, plan.moves, Processes({0: 0}, {0: 1}), sends=True).values()
    for parts in cut_moves(moves, 32):
        assert all(part.at % torch.empty(0, dtype=dtype_of(part.move.dtype)).element_size() == 0 for part in parts)
        assert [part.at for part in parts] == [0, *itertools.accumulate(part.num_bytes for part in parts[:-1])]
    assert sum(part.num_bytes for parts in cut_moves(moves, 32) for part in parts) == 9 * (1 + 4 + 2)
