"""Actor weights to every engine; the policy version rises only on the three proofs (`hybridflow.resharding.proofs`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hybridflow.metrics import Metric, Metrics
from hybridflow.resharding.incoming import Checksums, Incoming, Outgoing
from hybridflow.resharding.layout import combined, renumbered
from hybridflow.resharding.plan import Plan, make_plan, validate
from hybridflow.resharding.proofs import refuse_differences, verify_probes, verify_written
from hybridflow.resharding.sources import Topology
from hybridflow.resharding.transport import Delivery, RankLayout, Transport, choose_transport


@dataclass(frozen=True)
class Route:
    """Planned once a run. outgoing: one an actor rank. incoming: for each engine, one a tensor rank. later: for what
    training changes, once the rest is in place; None where it changes all."""

    plan: Plan
    transport: Transport
    outgoing: tuple[Outgoing, ...]
    incoming: tuple[tuple[Incoming, ...], ...]
    later: "Route | None" = None


def plan_route(sources: Sequence[RankLayout], engines: Sequence[RankLayout], bucket_bytes: int) -> Route:
    """sources: what each actor rank holds. engines: what each engine's tensor ranks must be given; engine k's are ranks
    k t_g to (k + 1) t_g - 1 of the plan. An engine shares no memory with the actor, so nothing is in place."""
    source = combined([one.layout for one in sources])
    per_engine = len(engines[0].layout.ranks)
    destination = combined([renumbered(one.layout, k * per_engine) for k, one in enumerate(engines)])
    topology = Topology(
        source_node={rank: one.node for one in sources for rank in one.layout.ranks},
        destination_node={rank: engines[rank // per_engine].node for rank in destination.ranks},
        beside={rank: _on_gpus_of(engines[rank // per_engine], sources) for rank in destination.ranks},
    )
    plan = make_plan(source, destination, topology)
    transport = choose_transport(plan, sources, engines, bucket_bytes)
    changing = _changing(sources, engines)
    later = None
    if len(changing) < len(source.parameters):
        part = make_plan(source.only(changing), destination.only(changing), topology)
        later = _route(part, transport, per_engine, changing)
    return _route(plan, transport, per_engine, None, later)


def _changing(sources: Sequence[RankLayout], engines: Sequence[RankLayout]) -> frozenset[str]:
    """What every sync must move: what training changes, and what an engine takes only together with that. All, where
    nothing is left to move."""
    every = frozenset(sources[0].layout.index_of)
    fixed = every.intersection(*(one.fixed for one in sources))
    groups = [group for engine in engines for group in engine.together]
    while any(torn := [group for group in groups if group & fixed and not group <= fixed]):
        fixed = fixed.difference(*torn)
    return (every - fixed) or every


def _route(
    plan: Plan, transport: Transport, per_engine: int, only: frozenset[str] | None, later: Route | None = None
) -> Route:
    validate(plan)
    parts = [Incoming.of(plan, rank, only) for rank in plan.destination.ranks]
    return Route(
        plan,
        transport,
        tuple(Outgoing.of(plan, rank) for rank in plan.source.ranks),
        tuple(tuple(parts[first : first + per_engine]) for first in range(0, len(parts), per_engine)),
        later,
    )


def _on_gpus_of(engine: RankLayout, sources: Sequence[RankLayout]) -> list[int]:
    """The source ranks whose weights are on a GPU that the engine sees."""
    near = [one for one in sources if one.node == engine.node and set(one.gpus) & set(engine.gpus)]
    return [rank for one in near for rank in one.layout.ranks]


class PolicySync:
    """Owns the policy version. `probe` are fixed token ids whose log-probs both sides compute.

    tolerance: the largest allowed difference of a probe log-prob, in nats (float32: 1e-4; bf16 needs more).
    bucket_bytes: of one message, where weights travel through the store.
    read_back_every: syncs between two comparisons of what the engines hold with what the actor holds; 0 is never.
    """

    def __init__(
        self,
        actor: Any,
        rollout: Any,
        probe: list[int],
        tolerance: float,
        bucket_bytes: int,
        read_back_every: int = 0,
    ) -> None:
        self.actor, self.rollout, self.probe = actor, rollout, probe
        self.tolerance, self.bucket_bytes, self.read_back_every = tolerance, bucket_bytes, read_back_every
        self.version = 0
        self._route: Route | None = None
        self._used: Route | None = None
        self._in_place = False

    def sync(self, loaded: Callable[[], None] | None = None) -> Metrics:
        """Send what training has changed, at first all; receive, verify, then raise the version. Raises WeightSyncError
        and leaves the version as it is; then all is sent the next time.

        loaded: called when all engines have proved that the weights are in their memory, before the log-probs of the
        probe are asked for: what waits for that moment, such as caches that the forward pass needs.
        """
        return self._deliver(self.version + 1, self._changing(), loaded)

    def resend(self, loaded: Callable[[], None] | None = None) -> None:
        """As `sync`, under the version as it is: for engines that have lost what training changes, and that alone."""
        self._deliver(self.version, self._changing(), loaded)

    def _changing(self) -> Route:
        route = self.route()
        return route.later or route if self._in_place else route

    def read_back(self) -> tuple[str, ...]:
        """Raise WeightSyncError unless every engine computes with the actor's weights, bit for bit. Answers the
        parameters that cannot be read."""
        self.use(self.route())
        offers = self.actor.offer().result()
        found = self.rollout.read_back(tuple(offers)).result()
        refuse_differences(found)
        return tuple(sorted({name for of_engine in found for name in of_engine.unread}))

    def restore(self, version: int, loaded: Callable[[], None] | None = None) -> None:
        """Give engines that hold other weights all of the actor's, under the version it had."""
        self._deliver(version, self.route(), loaded)

    def route(self) -> Route:
        """For all of the weights."""
        if self._route is None:
            held, wanted = self.actor.layout(), self.rollout.layout()
            self._route = plan_route(held.result(), wanted.result(), self.bucket_bytes)
        return self._route

    def through(self, transport: Transport) -> None:
        """Weights take another transport than the one that was chosen for them."""
        route = self.route()
        later = route.later and replace(route.later, transport=transport)
        self._route = replace(route, transport=transport, later=later)

    def use(self, route: Route) -> None:
        """Each rank gets its part of the route, unless it has it: once, not at every sync."""
        if route is self._used:
            return
        self._used = None
        taken = self.actor.take_route(list(route.outgoing), [route.transport] * len(route.outgoing))
        self.rollout.take_route(list(route.incoming), [route.transport] * len(route.incoming)).result()
        taken.result()
        self._used = route

    def _deliver(self, version: int, route: Route, loaded: Callable[[], None] | None) -> Metrics:
        self._in_place = False
        self.use(route)
        offers = self.actor.offer().result()
        proofs = self.actor.prove(self.probe)
        probe = () if loaded else tuple(self.probe)
        receipts = self.rollout.receive(Delivery(version, tuple(offers), probe)).result()
        sent: Checksums = {row: value for checksums, _ in proofs.result() for row, value in checksums.items()}
        sent_logprobs = proofs.result()[0][1]
        verify_written(route.plan, sent, receipts)
        if self.read_back_every and version % self.read_back_every == 0:
            self.read_back()
        if loaded:
            loaded()
            found = self.rollout.probe(self.probe).result()
            receipts = [replace(receipt, probe_logprobs=of) for receipt, of in zip(receipts, found, strict=True)]
        verify_probes(sent_logprobs, receipts, self.tolerance)
        self.rollout.trust().result()
        self.version, self._in_place = version, True
        difference = max(
            abs(theirs - ours)
            for receipt in receipts
            for theirs, ours in zip(receipt.probe_logprobs, sent_logprobs, strict=True)
        )
        return {
            "sync/version": Metric(version),
            "sync/bytes": Metric(sum(receipt.num_bytes for receipt in receipts)),
            "sync/probe_difference_max": Metric(difference, reduction="max"),
        }
