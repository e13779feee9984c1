"""Actor weights to every engine; the policy version rises only on the three proofs (`hybridflow.resharding.proofs`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hybridflow.metrics import Metric, Metrics
from hybridflow.resharding.incoming import Checksums, Incoming, Outgoing
from hybridflow.resharding.layout import combined, renumbered
from hybridflow.resharding.plan import Plan, make_plan, validate
from hybridflow.resharding.proofs import verify
from hybridflow.resharding.sources import Topology
from hybridflow.resharding.transport import Delivery, RankLayout, Transport, choose_transport


@dataclass(frozen=True)
class Route:
    """Planned once a run. outgoing: one an actor rank. incoming: for each engine, one a tensor rank."""

    plan: Plan
    transport: Transport
    outgoing: tuple[Outgoing, ...]
    incoming: tuple[tuple[Incoming, ...], ...]


def plan_route(sources: Sequence[RankLayout], engines: Sequence[RankLayout], bucket_bytes: int) -> Route:
    """sources: what each actor rank holds. engines: what each engine's tensor ranks must be given; engine k's are ranks
    k t_g to (k + 1) t_g - 1 of the plan. An engine shares no memory with the actor, so nothing is in place."""
    source = combined([one.layout for one in sources])
    per_engine = len(engines[0].layout.ranks)
    destination = combined([renumbered(one.layout, k * per_engine) for k, one in enumerate(engines)])
    topology = Topology(
        source_node={rank: one.node for one in sources for rank in one.layout.ranks},
        destination_node={rank: engines[rank // per_engine].node for rank in destination.ranks},
    )
    plan = make_plan(source, destination, topology)
    validate(plan)
    parts = [Incoming.of(plan, rank) for rank in destination.ranks]
    return Route(
        plan,
        choose_transport(plan, sources, bucket_bytes),
        tuple(Outgoing.of(plan, rank) for rank in source.ranks),
        tuple(tuple(parts[k * per_engine : (k + 1) * per_engine]) for k in range(len(engines))),
    )


class PolicySync:
    """Owns the policy version. `probe` are fixed token ids whose log-probs both sides compute.

    tolerance: the largest allowed difference of a probe log-prob, in nats (float32: 1e-4; bf16 needs more).
    bucket_bytes: of one message, where weights travel through the store.
    """

    def __init__(self, actor: Any, rollout: Any, probe: list[int], tolerance: float, bucket_bytes: int) -> None:
        self.actor, self.rollout, self.probe = actor, rollout, probe
        self.tolerance, self.bucket_bytes = tolerance, bucket_bytes
        self.version = 0
        self._route: Route | None = None

    def sync(self) -> Metrics:
        """Send, receive, verify, then raise the version. Raises WeightSyncError and leaves the version as it is."""
        return self._deliver(self.version + 1)

    def restore(self, version: int) -> None:
        """Give engines that hold other weights those of the actor, under the version it had."""
        self._deliver(version)

    def route(self) -> Route:
        if self._route is None:
            held, wanted = self.actor.layout(), self.rollout.layout()
            self._route = plan_route(held.result(), wanted.result(), self.bucket_bytes)
        return self._route

    def _deliver(self, version: int) -> Metrics:
        route = self.route()
        num_ranks, probe = len(route.outgoing), tuple(self.probe)
        offers = self.actor.offer(list(route.outgoing), [route.transport] * num_ranks).result()
        proofs = self.actor.prove(list(route.outgoing), [self.probe] * num_ranks)
        deliveries = [Delivery(version, parts, route.transport, tuple(offers), probe) for parts in route.incoming]
        receipts = self.rollout.receive(deliveries).result()
        sent: Checksums = {row: value for checksums, _ in proofs.result() for row, value in checksums.items()}
        sent_logprobs = proofs.result()[0][1]
        verify(route.plan, sent, sent_logprobs, receipts, self.tolerance)
        self.rollout.trust().result()
        self.version = version
        difference = max(
            abs(theirs - ours)
            for receipt in receipts
            for theirs, ours in zip(receipt.probe_logprobs, sent_logprobs, strict=True)
        )
        rows = np.array([row for receipt in receipts for row in receipt.checksums], dtype=np.int64)
        num_bytes = int(route.plan.num_bytes(route.plan.moves.rows(rows)).sum())
        return {
            "sync/version": Metric(version),
            "sync/bytes": Metric(num_bytes),
            "sync/probe_difference_max": Metric(difference, reduction="max"),
        }
