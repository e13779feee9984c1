import pytest
import torch
from by_slicing import numbered
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_layouts import PARAMETERS, Side, sides

from hybridflow.batch_ref import Block
from hybridflow.errors import WeightSyncError
from hybridflow.resharding.decoder import Decoder, decoder_specs
from hybridflow.resharding.incoming import Incoming, Outgoing, assemble, expected_checksums
from hybridflow.resharding.layout import Parameter
from hybridflow.resharding.plan import make_plan
from hybridflow.resharding.published import mapped
from hybridflow.resharding.shards import Spec, Zero, build_layout, grid
from hybridflow.resharding.sources import Topology
from hybridflow.resharding.transfer import execute_here
from hybridflow.resharding.transport import Packed, PublishedMemory, RankLayout, ThroughStore, choose_transport

FULL = numbered(PARAMETERS)


class Memory:
    """A store that counts what is put and how often something is read; a block's handle is its batch."""

    def __init__(self):
        self.sizes = []
        self.num_reads = 0

    def put(self, batch):
        self.sizes.append(batch.ragged("weight_bytes").flat.nbytes)
        return Block(batch, None, batch.num_rows)

    def read(self, wants):
        self.num_reads += len(wants)
        return [(want.block.handle.select(want.columns), want.rows) for want in wants]


def deliver(transport, plan, held, store, per_engine=1, in_turn=False):
    """What every engine's ranks assemble, by rank, and the checksums of both sides. in_turn: no more than a bucket's
    memory at a time, or one storage of all ranks."""
    offers = [transport.offer(Outgoing.of(plan, rank), held[rank], store) for rank in plan.source.ranks]
    sent = {
        row: value
        for rank in plan.source.ranks
        for row, value in expected_checksums(Outgoing.of(plan, rank), held[rank]).items()
    }
    written, received = {}, {}
    ranks = list(plan.destination.ranks)
    for first in range(0, len(ranks), per_engine):
        parts = [Incoming.of(plan, r) for r in ranks[first : first + per_engine]]
        written |= {part.rank: {} for part in parts}
        for taken in (
            transport.take_in_turn(parts, offers, store) if in_turn else [transport.take(parts, offers, store)]
        ):
            assert [part.rank for part in taken.incoming] == ranks[first : first + per_engine]
            names = {filling.storage.name for part in taken.incoming for filling in part.fillings}
            if in_turn and taken.memory and len(names) > 1:
                assert sum(memory.nbytes for memory in taken.memory) <= transport.bucket_bytes
            with mapped(taken.publications) as sources:
                for incoming in taken.incoming:
                    for name, flat, checksums in assemble(incoming, sources):
                        written[incoming.rank][name] = flat
                        assert not received.keys() & checksums.keys()
                        received |= checksums
    return written, sent, received, offers


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None)
@given(
    one=sides(),
    other=sides(),
    bucket=st.sampled_from([64, 1000, 1 << 20]),
    through_store=st.booleans(),
    in_turn=st.booleans(),
    data=st.data(),
)
def test_both_transports_bring_what_a_transfer_does(one: Side, other: Side, bucket, through_store, in_turn, data):
    plan = make_plan(one.layout, other.layout)
    held, store = one.tensors(FULL), Memory()
    expected = {rank: plan.destination.allocate(rank) for rank in plan.destination.ranks}
    execute_here(plan, held, expected)
    num_ranks = len(plan.destination.ranks)
    per_engine = data.draw(st.sampled_from([size for size in range(1, num_ranks + 1) if num_ranks % size == 0]))
    transport = ThroughStore(bucket, data.draw(st.integers(1, 4))) if through_store else PublishedMemory()

    written, sent, received, offers = deliver(transport, plan, held, store, per_engine, in_turn)

    assert sent == received
    for rank, tensors in expected.items():
        assert written[rank].keys() == tensors.keys()
        assert all(torch.equal(written[rank][name], tensor) for name, tensor in tensors.items())
    if through_store:
        assert sum(store.sizes) == sum(offer.num_bytes for offer in offers) == plan.total_bytes
        assert max(store.sizes, default=0) <= bucket


@pytest.mark.parametrize(("data", "stage", "tensor"), [(2, 0, 1), (4, 3, 1), (4, 3, 2)])
def test_each_bucket_of_a_decoder_crosses_once(data, stage, tensor):
    model = Decoder(128, 64, 96, 2, 4, 2, 16)
    source = build_layout(decoder_specs(model), grid(data=data), Zero(stage))
    plan = make_plan(source, build_layout(decoder_specs(model), grid(tensor=tensor)))
    held, store = {rank: source.allocate(rank) for rank in source.ranks}, Memory()
    deliver(ThroughStore(20_000, data * tensor), plan, held, store, per_engine=tensor, in_turn=True)
    assert store.num_reads == len(store.sizes) > data * tensor


@pytest.fixture
def mixed():
    """Dtypes whose bytes are not multiples of each other's."""
    dtypes = {"a": "int8", "b": "float32", "c": "bfloat16", "d": "float16"}
    layout = build_layout([Spec(Parameter(name, (3, 3), dtype)) for name, dtype in dtypes.items()], grid())
    held = {name: torch.arange(9).to(getattr(torch, dtype)) + i for i, (name, dtype) in enumerate(dtypes.items())}
    return make_plan(layout, layout), {0: held}


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("bucket", [4, 7, 40, 64])
def test_mixed_dtypes_through_the_store(mixed, bucket, in_turn):
    plan, held = mixed
    store = Memory()
    written, sent, received, _ = deliver(ThroughStore(bucket), plan, held, store, in_turn=in_turn)
    assert sent == received and len(sent) == 4
    assert all(torch.equal(written[0][name], tensor) for name, tensor in held[0].items())
    assert sum(store.sizes) == 9 * (1 + 4 + 2 + 2) and max(store.sizes) <= bucket
    assert len(store.sizes) <= store.num_reads <= len(store.sizes) + 3, "again at most where a dtype begins in a bucket"


def test_a_bucket_that_did_not_come_is_named(mixed):
    plan, held = mixed
    store, transport = Memory(), ThroughStore(16)
    offer = transport.offer(Outgoing.of(plan, 0), held[0], store)
    short = Packed(0, {0: offer.buckets[0][:-1]}, offer.num_bytes)
    with pytest.raises(WeightSyncError, match="destination rank 0: 80 bytes came from source rank 0, the plan has 81"):
        transport.take([Incoming.of(plan, 0)], [short], store)


def test_a_bucket_of_memory_at_a_time(mixed):
    """Storages of 9, 36, 18 and 18 bytes."""
    plan, held = mixed
    store, sizes = Memory(), []
    offers = [ThroughStore(45).offer(Outgoing.of(plan, 0), held[0], store)]
    for taken in ThroughStore(45).take_in_turn([Incoming.of(plan, 0)], offers, store):
        names = [filling.storage.name for filling in taken.incoming[0].fillings]
        sizes.append((names, sum(memory.nbytes for memory in taken.memory)))
    assert sizes == [(["a", "b"], 45), (["c", "d"], 36)]
    larger = ThroughStore(20)
    offers = [larger.offer(Outgoing.of(plan, 0), held[0], store)]
    groups = [taken.incoming[0].fillings for taken in larger.take_in_turn([Incoming.of(plan, 0)], offers, store)]
    assert [[filling.storage.name for filling in fillings] for fillings in groups] == [["a"], ["b"], ["c"], ["d"]]


@pytest.mark.parametrize("transport", [PublishedMemory(), ThroughStore(64)])
def test_storages_that_are_not_the_layouts_are_refused_at_the_source(mixed, transport):
    plan, held = mixed
    for wrong in (held[0]["a"][:8], held[0]["a"].float()):
        with pytest.raises(WeightSyncError, match=r"send: source rank 0, a: \d elements of torch"):
            transport.offer(Outgoing.of(plan, 0), {**held[0], "a": wrong}, Memory())


def test_the_transport_follows_from_where_the_ranks_are():
    layout = build_layout([Spec(Parameter("w", (4, 4)))], grid(data=2))

    def chosen(sources, destinations, device="cpu"):
        near = Topology({}, dict(enumerate(sources)), dict(enumerate(destinations)))
        ranks = [RankLayout(layout, node, device) for node in sources]
        engines = [RankLayout(layout, node, device) for node in destinations]
        return choose_transport(make_plan(layout, layout, near), ranks, engines, 99)

    assert chosen("aa", "aa") == PublishedMemory()
    assert chosen("ab", "ab") == PublishedMemory()  # each engine finds a replica on its own node
    assert chosen("aa", "ab") == ThroughStore(99)
    assert chosen("aa", "aa", "cuda") == ThroughStore(99)


def test_only_what_an_engine_reads_is_handed_to_it():
    layout = build_layout([Spec(Parameter("w", (4, 4)))], grid(data=2))
    near = Topology({}, {0: "a", 1: "b"}, {0: "a", 1: "b"})
    plan, transport, store = make_plan(layout, layout, near), PublishedMemory(), Memory()
    offers = [transport.offer(Outgoing.of(plan, rank), {"w": torch.zeros(16)}, store) for rank in (0, 1)]
    (found,) = transport.take([Incoming.of(plan, 1)], offers, store).publications
    assert found.rank == 1
