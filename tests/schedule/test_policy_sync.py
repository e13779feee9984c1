"""The policy version rises only on proof from every engine."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from hybridflow.errors import WeightSyncError
from hybridflow.resharding.cuts import Even
from hybridflow.resharding.incoming import Checksum, assemble, expected_checksums
from hybridflow.resharding.layout import Parameter, renumbered
from hybridflow.resharding.proofs import Difference, ReadBack, Receipt
from hybridflow.resharding.published import mapped
from hybridflow.resharding.shards import Spec, build_layout, grid
from hybridflow.resharding.transport import CudaIpc, PublishedMemory, RankLayout, ThroughStore
from hybridflow.schedule.policy_sync import PolicySync

PROBE = [3, 1, 2]
PARAMETERS = [Parameter("a.weight", (4, 6)), Parameter("lm_head.weight", (4,))]
SPECS = [Spec(PARAMETERS[0], "every", (Even(0),)), Spec(PARAMETERS[1])]
OWN = [(0, "GPU-x"), (1, "GPU-y")]
FULL = {"a.weight": torch.arange(24.0), "lm_head.weight": torch.ones(4)}


@dataclass
class Done:
    value: Any

    def result(self) -> Any:
        return self.value


@dataclass
class FakeActor:
    """Two data ranks that hold everything."""

    held: list[dict[str, torch.Tensor]] = field(default_factory=lambda: [dict(FULL), dict(FULL)])
    fixed: frozenset[str] = frozenset()
    taken: list[Any] = field(default_factory=list)

    def layout(self) -> Done:
        layout = build_layout([Spec(parameter) for parameter in PARAMETERS], grid())
        return Done([RankLayout.here(renumbered(layout, rank), fixed=self.fixed) for rank in (0, 1)])

    def take_route(self, outgoing: Any, transports: Any) -> Done:
        self.taken = list(zip(outgoing, transports, strict=True))
        return Done([None, None])

    def offer(self) -> Done:
        return Done([transport.offer(out, self.held[out.rank], None) for out, transport in self.taken])

    def prove(self, probe: Any) -> Done:
        assert probe == PROBE
        return Done([(expected_checksums(out, self.held[out.rank]), [-1.0, -2.0]) for out, _ in self.taken])


@dataclass
class FakeRollout:
    """Two engines of two tensor ranks. harm: what engine 1 does to its receipt. reads: what it reads back."""

    harm: Any = None
    nodes: tuple[str | None, str | None] = (None, None)
    together: tuple[frozenset[str], ...] = ()
    seen: list[Any] = field(default_factory=list)
    holds: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    taken: list[Any] = field(default_factory=list)
    asked: list[int] = field(default_factory=lambda: list(PROBE))
    answers: list[float] = field(default_factory=lambda: [-1.0, -2.0])
    reads: ReadBack = field(default_factory=lambda: ReadBack(()))

    def layout(self) -> Done:
        here = RankLayout.here(build_layout(SPECS, grid(tensor=2)))
        return Done([RankLayout(here.layout, node or here.node, together=self.together) for node in self.nodes])

    def take_route(self, incoming: Any, transports: Any) -> Done:
        self.taken = list(zip(incoming, transports, strict=True))
        return Done([None, None])

    def receive(self, delivery: Any) -> Done:
        receipts = []
        assert delivery.probe == tuple(self.asked)
        for engine, (parts, transport) in enumerate(self.taken):
            taken = transport.take(parts, delivery.offers, None)
            sums: dict[int, int] = {}
            with mapped(taken.publications) as sources:
                for incoming in taken.incoming:
                    held = self.holds.setdefault(incoming.rank, {})
                    for name, flat, checksums in assemble(incoming, sources):
                        held[name] = flat
                        sums |= checksums
            receipt = Receipt(sums, [-1.0, -2.00005] if delivery.probe else [])
            receipts.append(self.harm(receipt) if self.harm and engine == 1 else receipt)
        self.seen.append(delivery.version)
        return Done(receipts)

    def probe(self, tokens: Any) -> Done:
        assert tokens == PROBE
        self.seen.append("probe")
        return Done([[-1.0, -2.00005], self.answers])

    def read_back(self, offers: Any) -> Done:
        assert len(offers) == 2
        self.seen.append("read back")
        return Done([ReadBack(()), self.reads])

    def trust(self) -> Done:
        self.seen.append("trusted")
        return Done([None, None])


def policy(harm: Any = None) -> PolicySync:
    return PolicySync(FakeActor(), FakeRollout(harm), PROBE, tolerance=1e-4, bucket_bytes=1 << 20)


def test_the_version_rises_by_one_on_proof_and_every_rank_has_its_slices() -> None:
    run = policy()
    metrics = run.sync()
    assert run.version == metrics["sync/version"].value == 1
    assert metrics["sync/probe_difference_max"].value == pytest.approx(5e-5)
    assert metrics["sync/bytes"].value == 4 * 2 * (24 + 2 * 4)
    assert torch.equal(run.rollout.holds[3]["a.weight"], torch.arange(12.0, 24.0))
    run.sync()
    assert run.version == 2 and run.rollout.seen == [1, "trusted", 2, "trusted"]


def test_what_waits_for_the_weights_comes_between_their_proof_and_the_probe() -> None:
    """Caches of engines that slept: their forward pass needs them, and the weights must be proven before."""
    run = policy()
    run.rollout.asked, run.read_back_every = [], 1
    metrics = run.sync(lambda: run.rollout.seen.append("loaded"))
    assert run.rollout.seen == [1, "read back", "loaded", "probe", "trusted"]
    assert metrics["sync/probe_difference_max"].value == pytest.approx(5e-5)
    run.rollout.seen.clear()
    run.rollout.answers = [-1.0, -2.1]
    with pytest.raises(WeightSyncError, match="rollout rank 1: proof of probe log-probs"):
        run.sync(lambda: run.rollout.seen.append("loaded"))
    assert run.version == 1 and run.rollout.seen == [2, "read back", "loaded", "probe"]


def test_nothing_comes_for_weights_that_are_not_proven() -> None:
    run = policy(lambda receipt: Receipt({}, []))
    run.rollout.asked = []
    with pytest.raises(WeightSyncError, match="proof of elements written failed"):
        run.restore(3, lambda: run.rollout.seen.append("loaded"))
    assert run.version == 0 and run.rollout.seen == [3]


def test_the_load_is_shared_by_equal_sources() -> None:
    sent = policy().route().plan.bytes_sent
    assert sent[0] == sent[1]


def first_row(receipt: Receipt) -> int:
    return min(receipt.checksums)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (
            lambda r: Receipt({k: v for k, v in r.checksums.items() if k != first_row(r)}, r.probe_logprobs),
            r"rollout rank 1, tensor rank 0: proof of elements written failed: 1 slices not written: "
            r"a.weight \[0, 0, 0\] to \[2, 6, 1\] of source rank \d",
        ),
        (
            lambda r: Receipt({**r.checksums, first_row(r): Checksum(24, 1)}, r.probe_logprobs),
            "rollout rank 1, tensor rank 0: proof of checksums as received failed: 1 slices other than sent: a.weight",
        ),
        (
            lambda r: Receipt({**r.checksums, 99: Checksum(24, 1)}, r.probe_logprobs),
            r"rows \[99\] are not of the plan's",
        ),
        (lambda r: Receipt(r.checksums, [-1.0, -2.1]), "rollout rank 1: proof of probe log-probs"),
        (lambda r: Receipt(r.checksums, [-1.0, float("nan")]), "probe"),
        (lambda r: Receipt(r.checksums, [-1.0]), "1 values for 2 probe tokens"),
    ],
)
def test_one_engine_without_proof_holds_the_version_and_none_is_trusted(harm: Any, said: str) -> None:
    run = policy(harm)
    with pytest.raises(WeightSyncError, match=said):
        run.sync()
    assert run.version == 0 and run.rollout.seen == [1]


def test_every_second_version_is_read_back_before_it_is_trusted() -> None:
    run = policy()
    run.read_back_every = 2
    for _ in range(3):
        run.sync()
    assert run.rollout.seen == [1, "trusted", 2, "read back", "trusted", 3, "trusted"]


def test_an_engine_that_holds_something_else_stops_the_run_and_is_named() -> None:
    run = policy()
    run.read_back_every = 1
    run.rollout.reads = ReadBack((Difference("a.weight", 1, (0, 2, 0), (1, 3, 1), 0.5),), ("experts",))
    said = r"rollout rank 1: read back, 1 slices.*a.weight, tensor rank 1, \[0, 2, 0\] to \[1, 3, 1\]: off by up to 0.5"
    with pytest.raises(WeightSyncError, match=said):
        run.sync()
    assert run.version == 0 and run.rollout.seen == [1, "read back"]
    run.rollout.reads = ReadBack((), ("experts",))
    assert run.read_back() == ("experts",)


def test_restore_delivers_under_the_saved_version() -> None:
    run = policy()
    run.restore(7)
    assert run.version == 7 and run.rollout.seen == [7, "trusted"]


def test_the_transport_is_chosen_once_from_where_the_ranks_are() -> None:
    run = policy()
    assert run.route().transport == PublishedMemory() and run.route() is run.route()
    run = policy()
    run.rollout.nodes = (None, "elsewhere")
    assert run.route().transport == ThroughStore(1 << 20, streams=2), "each tensor rank of an engine reads one source"


def test_another_transport_is_given_to_every_rank() -> None:
    run = policy()
    run.sync()
    run.through(ThroughStore(64))
    run.use(run.route())
    assert {transport for _, transport in run.actor.taken + run.rollout.taken} == {ThroughStore(64)}


def test_engines_on_gpus_read_the_replica_on_their_own() -> None:
    """Two full replicas, each on the GPU that one of two engines sees: none reads the other's, balanced or not."""
    run = policy()
    here = RankLayout.here(build_layout(SPECS, grid(tensor=2)))
    held = build_layout([Spec(parameter) for parameter in PARAMETERS], grid())
    run.actor.layout = lambda: Done([RankLayout.here(renumbered(held, rank), "cuda", (gpu,)) for rank, gpu in OWN])
    run.rollout.layout = lambda: Done([RankLayout(here.layout, here.node, gpus=(gpu,)) for _, gpu in OWN])
    route = run.route()
    assert route.transport == CudaIpc()
    assert [part.sources for parts in route.incoming for part in parts] == [(0,), (0,), (1,), (1,)]


def test_a_parameter_on_one_side_only_is_named_before_anything_is_sent() -> None:
    run = policy()
    odd = build_layout([*SPECS, Spec(Parameter("extra", (3,)))], grid(tensor=2))
    run.rollout.layout = lambda: Done([RankLayout.here(odd)])
    with pytest.raises(WeightSyncError, match="only the destination has extra"):
        run.sync()
    assert run.rollout.seen == []


def with_fixed(*names: str, together: tuple[frozenset[str], ...] = ()) -> PolicySync:
    run = policy()
    run.actor.fixed, run.rollout.together = frozenset(names), together
    return run


ALL_BYTES, HEAD_BYTES = 4 * 2 * (24 + 2 * 4), 4 * 4 * 4


def test_what_training_never_changes_is_sent_and_proven_once() -> None:
    run = with_fixed("a.weight")
    assert run.sync()["sync/bytes"].value == ALL_BYTES
    for held in run.actor.held:
        held["lm_head.weight"] = torch.full((4,), 2.0)
    assert [run.sync()["sync/bytes"].value for _ in range(2)] == [HEAD_BYTES, HEAD_BYTES]
    assert torch.equal(run.rollout.holds[3]["a.weight"], torch.arange(12.0, 24.0))
    assert torch.equal(run.rollout.holds[3]["lm_head.weight"], torch.full((4,), 2.0))
    assert {incoming.only for parts, _ in run.rollout.taken for incoming in parts} == {frozenset({"lm_head.weight"})}
    run.restore(7)  # of engines that may hold anything
    assert run.rollout.taken[0][0][0].only is None and run.version == 7
    assert run.sync()["sync/bytes"].value == HEAD_BYTES


def test_after_a_transfer_without_proof_all_is_sent_again() -> None:
    run = with_fixed("a.weight")
    run.sync()
    run.rollout.harm = lambda receipt: Receipt({**receipt.checksums, first_row(receipt): Checksum(0, 1)}, [-1.0, -2.0])
    with pytest.raises(WeightSyncError, match=r"other than sent: lm_head\.weight"):
        run.sync()
    run.rollout.harm = None
    assert run.sync()["sync/bytes"].value == ALL_BYTES
    assert run.sync()["sync/bytes"].value == HEAD_BYTES


@pytest.mark.parametrize(
    ("names", "together"),
    [
        (("a.weight",), (frozenset({"a.weight", "lm_head.weight"}),)),  # the engine takes both or none
        (("a.weight", "lm_head.weight"), ()),  # nothing trains
        ((), ()),
    ],
)
def test_where_nothing_can_stay_alone_all_is_sent_each_time(names: tuple, together: tuple) -> None:
    run = with_fixed(*names, together=together)
    assert [run.sync()["sync/bytes"].value for _ in range(2)] == [ALL_BYTES, ALL_BYTES]


def test_a_read_back_compares_what_was_sent_once_too() -> None:
    run = with_fixed("a.weight")
    run.sync()
    run.sync()
    run.read_back()
    assert run.rollout.taken[0][0][0].only is None
    assert run.sync()["sync/bytes"].value == HEAD_BYTES
