"""Which replica sends: memory first, then the device, then the node, then the least load. Deterministic."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hybridflow.resharding.boxes import Ints

SHARED, BESIDE, NEAR, FAR = range(4)


@dataclass(frozen=True)
class Topology:
    """What is close to what. Source and destination ranks are numbered apart.

    shared: destination rank -> the source ranks whose memory it shares (colocated on one device). source_node,
    destination_node: rank -> node; ranks without one are on no common node. beside: destination rank -> the source
    ranks on devices of which its process can read the memory.
    """

    shared: Mapping[int, Collection[int]] = field(default_factory=dict)
    source_node: Mapping[int, str] = field(default_factory=dict)
    destination_node: Mapping[int, str] = field(default_factory=dict)
    beside: Mapping[int, Collection[int]] = field(default_factory=dict)

    def same_memory(self, source: int, destination: int) -> bool:
        return source in self.shared.get(destination, ())

    def same_node(self, source: int, destination: int) -> bool:
        node = self.source_node.get(source)
        return self.same_memory(source, destination) or (
            node is not None and node == self.destination_node.get(destination)
        )

    def distance(self, source: int, destination: int) -> int:
        if self.same_memory(source, destination):
            return SHARED
        if source in self.beside.get(destination, ()):
            return BESIDE
        return NEAR if self.same_node(source, destination) else FAR


def colocated(ranks: Iterable[int]) -> Topology:
    """Destination rank r is on the device of source rank r."""
    return Topology({rank: (rank,) for rank in ranks})


def choose_sources(
    source_rank: Ints,
    destination_rank: Ints,
    holders: Sequence[Sequence[int]],
    cell: Ints,
    num_bytes: Ints,
    topology: Topology,
) -> tuple[Ints, NDArray[np.bool_]]:
    """(piece (M,), stays (M,)): the source piece of every need, and whether it shares the destination's memory.

    source_rank (N,): of every source piece. holders: the source pieces that contain each cell. Per need, (M,):
    destination_rank, the cell needed, and its bytes. Needs with a choice are served largest first, each by the holder
    that has least to send so far, so among full replicas no rank sends more than the mean plus the largest need.
    """
    counts = np.array([len(held) for held in holders], dtype=np.int64)
    flat = np.array([piece for held in holders for piece in held], dtype=np.int64)
    begins = np.cumsum(counts) - counts
    per_need = counts[cell]
    need = np.repeat(np.arange(len(cell)), per_need)
    starts = np.cumsum(per_need) - per_need
    candidate = flat[np.arange(len(need)) - starts[need] + begins[cell][need]]
    distance = _distances(source_rank[candidate], destination_rank[need], topology)
    nearest = np.minimum.reduceat(distance, starts) if len(cell) else distance
    kept = distance == nearest[need]
    need, candidate = need[kept], candidate[kept]
    first = np.searchsorted(need, np.arange(len(cell) + 1))
    chosen = candidate[first[:-1]]
    stays = nearest == SHARED
    free = np.nonzero(~stays & (np.diff(first) > 1))[0]
    forced = np.nonzero(~stays & (np.diff(first) == 1))[0]
    load: dict[int, int] = dict.fromkeys(np.unique(source_rank).tolist(), 0)
    for rank, size in zip(source_rank[chosen[forced]].tolist(), num_bytes[forced].tolist(), strict=True):
        load[rank] += size
    for index in free[np.argsort(-num_bytes[free], kind="stable")].tolist():
        pieces = candidate[first[index] : first[index + 1]].tolist()
        rank, piece = min(((int(source_rank[piece]), piece) for piece in pieces), key=lambda it: (load[it[0]], it[0]))
        chosen[index] = piece
        load[rank] += int(num_bytes[index])
    return chosen, stays


def _distances(source: Ints, destination: Ints, topology: Topology) -> Ints:
    """(K,) for pairs (K,), (K,); each different pair of ranks is looked up once."""
    if not len(source):
        return np.zeros(0, dtype=np.int64)
    both, inverse = np.unique(np.stack([source, destination], axis=1), axis=0, return_inverse=True)
    table = np.array([topology.distance(one, other) for one, other in both.tolist()], dtype=np.int64)
    return table[inverse.reshape(-1)]
