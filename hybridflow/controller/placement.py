"""Pools: bundles of CPUs and GPUs on a cluster, reserved as a Ray placement group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybridflow.controller.lanes import Lane
from hybridflow.errors import ConfigError

Resources = Mapping[str, float]


@dataclass(eq=False)
class Pool:
    """`num_bundles` places for a rank of each group that shares the pool (at most `max_groups`).

    `order`: bundle indices sorted by node, so that neighbouring ranks share one. `placement`: the Ray placement group
    (None in the local runtime).
    """

    name: str
    num_bundles: int
    cpus_per_bundle: float
    gpus_per_bundle: float
    max_groups: int
    lane: Lane
    placement: Any = None
    order: list[int] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)

    def admit(self, group: str, num_ranks: int, bundles_per_rank: int = 1) -> None:
        """Register a group, or say why it does not fit."""
        if num_ranks * bundles_per_rank > self.num_bundles:
            takes = "one bundle" if bundles_per_rank == 1 else f"{bundles_per_rank} bundles"
            raise ConfigError(
                f"{group}: {num_ranks} ranks asked for, but pool {self.name!r} has {self.num_bundles} bundles; "
                f"one rank of this group takes {takes}"
            )
        for rank in range(num_ranks):
            self._refuse_apart(group, rank, self.bundles_of(rank, bundles_per_rank))
        if len(self.groups) == self.max_groups:
            raise ConfigError(
                f"{group}: pool {self.name!r} was made for max_groups={self.max_groups} and already holds "
                f"{', '.join(self.groups)}; raise max_groups"
            )
        self.groups.append(group)

    def bundles_of(self, rank: int, bundles_per_rank: int) -> list[int]:
        """Neighbours in `order`. The rank's process lives in the first; the others are held for what it starts."""
        places = range(rank * bundles_per_rank, (rank + 1) * bundles_per_rank)
        return [self.order[k] if self.order else k for k in places]

    def _refuse_apart(self, group: str, rank: int, bundles: Sequence[int]) -> None:
        nodes = sorted({self.nodes[bundle] for bundle in bundles}) if self.nodes else []
        if len(nodes) > 1:
            raise ConfigError(
                f"{group}: rank {rank} takes {len(bundles)} bundles of one node, but those of pool {self.name!r} that "
                f"come next are on {' and '.join(nodes)}; make the bundles of each node a multiple of {len(bundles)}"
            )

    @property
    def rank_resources(self) -> dict[str, float]:
        """Share of a bundle that one rank takes (rounded down to Ray's grain of 1/10000)."""

        def share(amount: float) -> float:
            return int(amount / self.max_groups * 10000) / 10000

        return {"num_cpus": share(self.cpus_per_bundle), "num_gpus": share(self.gpus_per_bundle)}


def check_supply(pool: str, num_bundles: int, bundle: Resources, nodes: Mapping[str, Resources]) -> None:
    """Raise ConfigError, with demand against supply per node, when the bundles do not fit into what is free."""
    fits = {node: _count_fitting(bundle, free) for node, free in nodes.items()}
    if sum(fits.values()) >= num_bundles:
        return
    lines = [
        f"  node {node}: free {_text({kind: free.get(kind, 0) for kind in bundle})}; holds {fits[node]} bundles"
        for node, free in nodes.items()
    ]
    raise ConfigError(
        f"pool {pool!r} does not fit.\n  demand: {num_bundles} bundles of {_text(bundle)}\n"
        + "\n".join(lines or ["  no node is alive"])
        + f"\n  supply: {sum(fits.values())} bundles. Use fewer or smaller bundles, colocate roles, or add nodes."
    )


def _count_fitting(bundle: Resources, free: Resources) -> int:
    counts = [int((free.get(kind, 0) + 1e-6) / amount) for kind, amount in bundle.items() if amount > 0]
    return max(0, min(counts)) if counts else 1_000_000


def _text(resources: Resources) -> str:
    return ", ".join(f"{amount:g} {kind}" for kind, amount in resources.items()) or "nothing"


def order_by_node(bundle_nodes: Sequence[str]) -> list[int]:
    """Bundle indices so that bundles of one node are neighbours."""
    return sorted(range(len(bundle_nodes)), key=lambda k: (bundle_nodes[k], k))
