import pickle

import pytest
import torch
from by_slicing import numbered
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_layouts import PARAMETERS, Side, sides

from hybridflow.errors import WeightSyncError
from hybridflow.resharding import incoming as module
from hybridflow.resharding.cuts import Even
from hybridflow.resharding.incoming import Incoming, Outgoing, assemble, checksum, expected_checksums
from hybridflow.resharding.layout import Parameter
from hybridflow.resharding.plan import make_plan
from hybridflow.resharding.published import mapped, publish
from hybridflow.resharding.shards import Spec, build_layout, grid
from hybridflow.resharding.sources import colocated
from hybridflow.resharding.transfer import execute_here

FULL = numbered(PARAMETERS)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(one=sides(), other=sides(), block=st.sampled_from([8, 100, 1 << 20]))
def test_assembled_storages_are_those_of_a_transfer_and_every_byte_is_counted(one: Side, other: Side, block):
    plan = make_plan(one.layout, other.layout)
    held = one.tensors(FULL)
    expected = {rank: plan.destination.allocate(rank) for rank in plan.destination.ranks}
    execute_here(plan, held, expected)

    sent = {row: value for rank in plan.source.ranks for row, value in _sums(plan, rank, held).items()}
    assert sorted(sent) == list(range(len(plan.moves)))
    received = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_BYTES", block)
        for rank in plan.destination.ranks:
            incoming = pickle.loads(pickle.dumps(Incoming.of(plan, rank)))
            assert incoming.num_bytes == plan.bytes_received[rank]
            written = []
            for name, flat, checksums in assemble(incoming, held):
                assert torch.equal(flat, expected[rank][name]), (rank, name)
                received |= checksums
                written.append(name)
            assert written == list(expected[rank])
    assert received == sent
    assert sum(Outgoing.of(plan, rank).num_bytes for rank in plan.source.ranks) == plan.total_bytes


def _sums(plan, rank, held):
    return expected_checksums(Outgoing.of(plan, rank), held[rank])


@pytest.fixture
def plan():
    """Two ranks' columns of `w` to two ranks' rows."""
    specs = [Spec(Parameter("w", (8, 8)), "every", (Even(dim),)) for dim in (1, 0)]
    return make_plan(build_layout(specs[:1], grid(1, 2)), build_layout(specs[1:], grid(1, 2)))


@pytest.fixture
def held():
    generator = torch.Generator().manual_seed(0)
    return {rank: {"w": torch.randn(32, generator=generator)} for rank in (0, 1)}


def test_from_published_memory(plan, held):
    expected = {rank: plan.destination.allocate(rank) for rank in (0, 1)}
    execute_here(plan, held, expected)
    with mapped([publish(rank, storages) for rank, storages in held.items()]) as sources:
        for rank in (0, 1):
            incoming = Incoming.of(plan, rank)
            assert incoming.sources == (0, 1)
            ((_, flat, _),) = assemble(incoming, sources)
            assert torch.equal(flat, expected[rank]["w"])


def test_into_live_tensors(plan, held):
    live = torch.full((4, 8), 9.0)
    ((_, flat, checksums),) = assemble(Incoming.of(plan, 1), held, {"w": live})
    assert flat.data_ptr() == live.data_ptr()
    assert torch.equal(live[:, :4], held[0]["w"].view(8, 4)[4:])
    sent = {row: value for rank in (0, 1) for row, value in _sums(plan, rank, held).items()}
    assert checksums.items() < sent.items()
    for wrong, message in ((live.double(), "32 elements of torch.float64"), (live.t(), "not contiguous"), (None, "")):
        with pytest.raises(WeightSyncError, match=f"destination rank 1, w: .*{message}"):
            next(assemble(Incoming.of(plan, 1), held, {"w": wrong} if wrong is not None else {}))


@pytest.mark.parametrize(("source", "destination"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_dtypes_are_converted_and_the_checksum_is_of_what_travels(source, destination):
    layouts = [build_layout([Spec(Parameter("w", (40,), dtype))], grid()) for dtype in (source, destination)]
    plan = make_plan(*layouts)
    wide = torch.randn(40, generator=torch.Generator().manual_seed(0))
    held = {0: {"w": wide.to(getattr(torch, source))}}
    ((_, flat, checksums),) = assemble(Incoming.of(plan, 0), held)
    assert torch.equal(flat, wide.to(torch.bfloat16).to(getattr(torch, destination)))
    assert checksums == _sums(plan, 0, held)
    assert Incoming.of(plan, 0).num_bytes == 80


@pytest.mark.parametrize("element", [0, 13, 31])
def test_one_bit_changes_the_checksum_of_its_slice_alone(plan, held, element):
    before = _sums(plan, 0, held)
    held[0]["w"].view(torch.int32)[element] ^= 1
    after = _sums(plan, 0, held)
    changed = {row for row in before if before[row] != after[row]}
    moves = plan.as_moves(plan.moves)
    assert [moves[row].low[0] <= element // 4 < moves[row].high[0] for row in changed] == [True]


def test_the_order_of_elements_counts_and_strides_do_not():
    matrix = torch.arange(24.0).view(4, 6)
    assert checksum(matrix.t(), torch.float32) == checksum(matrix.t().contiguous(), torch.float32)
    assert checksum(matrix.t(), torch.float32) != checksum(matrix, torch.float32)


def test_what_the_plan_reads_and_nobody_published_is_named(plan, held):
    with pytest.raises(WeightSyncError, match="destination rank 0: source rank 1 published no 'w'"):
        list(assemble(Incoming.of(plan, 0), {0: held[0], 1: {}}))
    with pytest.raises(WeightSyncError, match="memory that source and destination share"):
        Incoming.of(make_plan(plan.source, plan.source, colocated((0, 1))), 0)


def test_checksums_are_of_what_lies_in_memory_after_the_copy(plan, held, monkeypatch):
    copy = torch.Tensor.copy_

    def bad_memory(into, source):
        copy(into, source)
        into[-1] = 0.5

    monkeypatch.setattr(torch.Tensor, "copy_", bad_memory)
    ((_, _, checksums),) = assemble(Incoming.of(plan, 0), held)
    sent = {row: value for rank in (0, 1) for row, value in _sums(plan, rank, held).items()}
    assert all(checksums[row].xxh3_64 != sent[row].xxh3_64 for row in checksums)
