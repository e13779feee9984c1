"""How slices get from the source ranks' memory to one that a destination rank can read.

`PublishedMemory` where all are in the memory of one node: nothing moves before the destination copies its slices.
`ThroughStore` for all else (other nodes, weights on GPUs): the source packs what the plan names for each destination
rank into buckets, and the destination's process puts them into shared memory of its own, so that its engine reads both
in one way. A run has one transport.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from hybridflow.batch import Batch, Ragged
from hybridflow.batch_ref import BatchRef, Store
from hybridflow.errors import WeightSyncError
from hybridflow.resharding.boxes import row_strides
from hybridflow.resharding.buckets import cut_moves, filled_bytes, pack
from hybridflow.resharding.incoming import Filling, Incoming, Outgoing
from hybridflow.resharding.layout import Layout, dtype_of, refuse_other_tensors
from hybridflow.resharding.plan import Move, Plan, Slice
from hybridflow.resharding.published import Publication, publish, shared_bytes, this_node


@dataclass(frozen=True)
class RankLayout:
    """What one rank answers: what it holds, or is to be given, on which node, and in the memory of which kind of device
    (torch's name: `cpu`, `cuda`)."""

    layout: Layout
    node: str
    device: str = "cpu"

    @staticmethod
    def here(layout: Layout, device: str = "cpu") -> "RankLayout":
        return RankLayout(layout, this_node(), device)


@dataclass(frozen=True)
class Packed:
    """A source rank's buckets, by destination rank, in a store. num_bytes: of all of them."""

    rank: int
    buckets: Mapping[int, tuple[BatchRef, ...]]
    num_bytes: int


Offer: TypeAlias = Publication | Packed


@dataclass(frozen=True)
class Taken:
    """What an engine reads. memory: kept until it has read; the publications point there."""

    incoming: tuple[Incoming, ...]
    publications: tuple[Publication, ...]
    memory: tuple[Tensor, ...] = field(default=(), repr=False)


class Transport(Protocol):
    def offer(self, outgoing: Outgoing, storages: Mapping[str, Tensor], store: Store) -> Offer:
        """On a source rank: make these live storages readable for the ranks that the plan sends them to."""
        ...

    def take(self, incoming: Sequence[Incoming], offers: Sequence[Offer], store: Store) -> Taken:
        """In a destination's process: the parts of the plan of its ranks, and where an engine reads their sources.
        offers: of all source ranks, in rank order."""
        ...


@dataclass(frozen=True)
class Delivery:
    """One sync to one engine. incoming: one for each of its tensor ranks; offers: of all source ranks, in rank order.
    probe: token ids whose log-probs are to be answered."""

    version: int
    incoming: tuple[Incoming, ...]
    transport: Transport
    offers: tuple[Offer, ...]
    probe: tuple[int, ...]


def choose_transport(plan: Plan, sources: Sequence[RankLayout], bucket_bytes: int) -> Transport:
    """Published memory where all sources hold their weights in the CPU's memory and every move stays on its node, else
    the store, which takes them from any device."""
    on_cpu = all(source.device == "cpu" for source in sources)
    return PublishedMemory() if on_cpu and not plan.bytes_across_nodes else ThroughStore(bucket_bytes)


@dataclass(frozen=True)
class PublishedMemory:
    """All on one node: the offer says where the live weights are."""

    def offer(self, outgoing: Outgoing, storages: Mapping[str, Tensor], store: Store) -> Publication:
        refuse_other_tensors(outgoing.storages, storages, "send: source")
        return publish(outgoing.rank, storages)

    def take(self, incoming: Sequence[Incoming], offers: Sequence[Offer], store: Store) -> Taken:
        wanted = {rank for part in incoming for rank in part.sources}
        found = tuple(offer for offer in offers if isinstance(offer, Publication) and offer.rank in wanted)
        return Taken(tuple(incoming), found)


@dataclass(frozen=True)
class ThroughStore:
    """Buckets of at most `bucket_bytes`, one alive at a time where they are packed. The destination's process holds
    all that its ranks get once more, until its engine has taken it over."""

    bucket_bytes: int

    def offer(self, outgoing: Outgoing, storages: Mapping[str, Tensor], store: Store) -> Packed:
        refuse_other_tensors(outgoing.storages, storages, "send: source")
        by_rank: dict[int, list[Move]] = {}
        for move in outgoing.moves:
            by_rank.setdefault(move.destination.rank, []).append(move)
        named, buckets, num_bytes = {outgoing.rank: storages}, {}, 0
        for rank, moves in by_rank.items():
            refs = []
            for parts in cut_moves(_in_wire_order(moves), self.bucket_bytes):
                flat = pack(parts, named, torch.empty(filled_bytes(parts), dtype=torch.uint8))
                num_bytes += flat.nbytes
                refs.append(BatchRef.put(Batch({"weight_bytes": Ragged(flat, torch.tensor([len(flat)]))}), store))
            buckets[rank] = tuple(refs)
        return Packed(outgoing.rank, buckets, num_bytes)

    def take(self, incoming: Sequence[Incoming], offers: Sequence[Offer], store: Store) -> Taken:
        packed = {offer.rank: offer for offer in offers if isinstance(offer, Packed)}
        moves = {part.rank: _rows_by_source(part) for part in incoming}
        memory, publications, places = [], [], dict[int, Slice]()
        for source in sorted({source for found in moves.values() for source in found}):
            storages: dict[str, Tensor] = {}
            for rank, found in moves.items():
                if source in found:
                    flat = _fetched(packed[source], rank, found[source], store)
                    memory.append(flat)
                    storages |= _unpacked(flat, rank, source, found[source], places)
            publications.append(publish(source, storages, lasting=False))
        moved = tuple(
            Incoming(part.rank, tuple(_moved(filling, places) for filling in part.fillings)) for part in incoming
        )
        return Taken(moved, tuple(publications), tuple(memory))


def _in_wire_order(moves: Iterable[Move]) -> list[Move]:
    """Of one pair of ranks, in the plan's order: wide dtypes first, so that every move is aligned without a gap."""
    return sorted(moves, key=lambda move: -dtype_of(move.dtype).itemsize)


def _rows_by_source(incoming: Incoming) -> dict[int, dict[int, Move]]:
    """By source rank, the moves by row in the plan's order."""
    rows = {row: move for filling in incoming.fillings for row, move in zip(filling.rows, filling.moves, strict=True)}
    found: dict[int, dict[int, Move]] = {}
    for row in sorted(rows):
        found.setdefault(rows[row].source.rank, {})[row] = rows[row]
    return found


def _fetched(packed: Packed, rank: int, moves: Mapping[int, Move], store: Store) -> Tensor:
    """(bytes,) uint8: all buckets one after another."""
    expected = sum(move.num_bytes for move in moves.values())
    flat, filled = shared_bytes(packed.rank, expected), 0
    for ref in packed.buckets.get(rank, ()):
        bucket = ref.fetch(store, ("weight_bytes",)).ragged("weight_bytes").flat
        if filled + len(bucket) <= expected:
            flat[filled : filled + len(bucket)] = bucket
        filled += len(bucket)
    if filled != expected:
        raise WeightSyncError(
            f"receive: destination rank {rank}: {filled} bytes came from source rank {packed.rank}, the plan has "
            f"{expected}; the weights are not to be used"
        )
    return flat


def _unpacked(
    flat: Tensor, rank: int, source: int, moves: Mapping[int, Move], places: dict[int, Slice]
) -> dict[str, Tensor]:
    """The bytes as one storage a dtype; `places` gets where each row's move lies."""
    storages: dict[str, Tensor] = {}
    start = 0
    order = sorted(moves.items(), key=lambda item: -dtype_of(item[1].dtype).itemsize)
    for dtype, group in groupby(order, key=lambda item: item[1].dtype):
        name, offset = f"{dtype} {len(storages)} for rank {rank}", 0
        for row, move in group:
            places[row] = Slice(source, name, offset, row_strides(move.shape))
            offset += move.num_elements
        num_bytes = offset * dtype_of(dtype).itemsize
        storages[name] = flat[start : start + num_bytes].view(dtype_of(dtype))
        start += num_bytes
    return storages


def _moved(filling: Filling, places: Mapping[int, Slice]) -> Filling:
    moves = zip(filling.rows, filling.moves, strict=True)
    return replace(filling, moves=tuple(replace(move, source=places[row]) for row, move in moves))
