"""How slices get from the source ranks' memory to one that a destination rank can read.

`PublishedMemory` where all are in the memory of one node: nothing moves before the destination copies its slices.
`CudaIpc` likewise for weights on GPUs that the destination's process sees. `ThroughStore` for all else: the source
packs what the plan names for each destination rank into buckets, and the destination's process puts them into shared
memory of its own, so that its engine reads both in one way. A run has one transport.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from typing import Any, NoReturn, Protocol, TypeAlias

import torch
from torch import Tensor

from hybridflow.batch import Batch, Ragged
from hybridflow.batch_ref import BatchRef, Store, Want
from hybridflow.errors import WeightSyncError
from hybridflow.resharding.boxes import row_strides
from hybridflow.resharding.buckets import Part, Storages, cut_moves, filled_bytes, pack
from hybridflow.resharding.cuda_ipc import gpu_of, publish_cuda
from hybridflow.resharding.incoming import Filling, Incoming, Outgoing
from hybridflow.resharding.layout import Layout, dtype_of, refuse_other_tensors
from hybridflow.resharding.plan import Move, Plan, Slice
from hybridflow.resharding.published import Publication, publish, shared_bytes, this_node

WIDEST = 8
"""Bytes of the widest element: a bucket holds at least one."""


@dataclass(frozen=True)
class RankLayout:
    """What one rank answers: what it holds, or is to be given, on which node, and in the memory of which kind of device
    (torch's name: `cpu`, `cuda`). gpus: UUIDs; of a training rank the one that its weights are on, of an engine those
    that all of its processes see. fixed: of a training rank, the parameters that training never changes. together: of
    an engine, the parameters of which all are written or none."""

    layout: Layout
    node: str
    device: str = "cpu"
    gpus: tuple[str, ...] = ()
    fixed: frozenset[str] = frozenset()
    together: tuple[frozenset[str], ...] = ()

    @staticmethod
    def here(layout: Layout, device: str = "cpu", gpus: tuple[str, ...] = (), **more: Any) -> "RankLayout":
        return RankLayout(layout, this_node(), device, gpus, **more)


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
    def prepare(self, outgoing: Outgoing, storages: Mapping[str, Tensor]) -> None:
        """On a source rank, once, before the first sync: put these live storages where they are to be read."""
        ...

    def offer(self, outgoing: Outgoing, storages: Mapping[str, Tensor], store: Store) -> Offer:
        """On a source rank: make these live storages readable for the ranks that the plan sends them to."""
        ...

    def take(self, incoming: Sequence[Incoming], offers: Sequence[Offer], store: Store) -> Taken:
        """In a destination's process: the parts of the plan of its ranks, and where an engine reads their sources.
        offers: of all source ranks, in rank order."""
        ...

    def take_in_turn(self, incoming: Sequence[Incoming], offers: Sequence[Offer], store: Store) -> Iterator[Taken]:
        """The same in parts, storage by storage in the order of the layout. An engine takes each over, and lets go of
        it, before the next is asked for: only one needs memory."""
        ...


@dataclass(frozen=True)
class Delivery:
    """One sync. offers: of all source ranks, in rank order. probe: token ids whose log-probs are to be answered."""

    version: int
    offers: tuple[Offer, ...]
    probe: tuple[int, ...]


def choose_transport(
    plan: Plan, sources: Sequence[RankLayout], engines: Sequence[RankLayout], bucket_bytes: int
) -> Transport:
    """Memory that is read in place, where every move stays on its node: published by sources that hold their weights in
    the CPU's memory, opened on GPUs that the engines see. Else the store, which takes them from any device. Engine k
    has an equal part of the plan's destination ranks."""
    per_engine = len(plan.destination.ranks) // len(engines)
    routes = set(plan.routes(plan.moves))
    streams = Counter(to // per_engine for _, to in routes)
    num_dtypes = len({storage.dtype for storage in plan.destination.storages})
    store = ThroughStore(bucket_bytes, max(streams.values(), default=1) * max(1, num_dtypes))
    if plan.bytes_across_nodes:
        return store
    if all(source.device == "cpu" for source in sources):
        return PublishedMemory()
    gpus = {rank: source.gpus for source in sources if source.device == "cuda" for rank in source.layout.ranks}
    seen = all(set(gpus.get(rank, ())) & set(engines[to // per_engine].gpus) for rank, to in routes)
    return CudaIpc() if seen else store


@dataclass(frozen=True)
class PublishedMemory:
    """All on one node: the offer says where the live weights are. They are moved into shared memory beforehand: one
    memory after another, each held twice meanwhile, and ZeRO has all of a rank's weights in one."""

    def prepare(self, outgoing: Outgoing, storages: Mapping[str, Tensor]) -> None:
        refuse_other_tensors(outgoing.storages, storages, "send: source")
        publish(outgoing.rank, {storage.name: storages[storage.name] for storage in outgoing.storages})

    def offer(self, outgoing: Outgoing, storages: Mapping[str, Tensor], store: Store) -> Publication:
        refuse_other_tensors(outgoing.storages, storages, "send: source")
        return publish(outgoing.rank, {storage.name: storages[storage.name] for storage in outgoing.storages})

    def take(self, incoming: Sequence[Incoming], offers: Sequence[Offer], store: Store) -> Taken:
        wanted = {rank for part in incoming for rank in part.sources}
        found = tuple(offer for offer in offers if isinstance(offer, Publication) and offer.rank in wanted)
        return Taken(tuple(incoming), found)

    def take_in_turn(self, incoming: Sequence[Incoming], offers: Sequence[Offer], store: Store) -> Iterator[Taken]:
        yield self.take(incoming, offers, store)


@dataclass(frozen=True)
class CudaIpc(PublishedMemory):
    """All on the GPUs of one node, each seen by the engines that read it: the offer has the handles of the live
    weights."""

    def prepare(self, outgoing: Outgoing, storages: Mapping[str, Tensor]) -> None:
        """They are read where they are."""

    def offer(self, outgoing: Outgoing, storages: Mapping[str, Tensor], store: Store) -> Publication:
        refuse_other_tensors(outgoing.storages, storages, "send: source")
        sent = {name: storages[name] for name in dict.fromkeys(move.source.storage for move in outgoing.moves)}
        return publish_cuda(outgoing.rank, sent, gpu_of(next(iter(storages.values())).device))


@dataclass(frozen=True)
class ThroughStore:
    """Buckets, one alive at a time where they are packed. A destination's process has one open of each of its `streams`
    (source rank, one of its ranks, dtype), together at most `bucket_bytes`; and takes as many bytes at a time out of
    them, or one larger storage. A bucket is fetched once where storages are taken in the order of the stream, as
    a decoder's are; seldom a second time where not."""

    bucket_bytes: int
    streams: int = 1

    @property
    def stream_bytes(self) -> int:
        """Of one bucket."""
        return max(min(WIDEST, self.bucket_bytes), self.bucket_bytes // self.streams)

    def prepare(self, outgoing: Outgoing, storages: Mapping[str, Tensor]) -> None:
        """Every offer makes buckets of its own."""

    def offer(self, outgoing: Outgoing, storages: Mapping[str, Tensor], store: Store) -> Packed:
        refuse_other_tensors(outgoing.storages, storages, "send: source")
        by_rank: dict[int, list[Move]] = {}
        for move in outgoing.moves:
            by_rank.setdefault(move.destination.rank, []).append(move)
        named = {outgoing.rank: storages}
        buckets = {
            rank: tuple(_put(parts, named, store) for parts in cut_moves(_in_wire_order(moves), self.stream_bytes))
            for rank, moves in by_rank.items()
        }
        return Packed(outgoing.rank, buckets, outgoing.num_bytes)

    def take(self, incoming: Sequence[Incoming], offers: Sequence[Offer], store: Store) -> Taken:
        return self._taken(incoming, self._streams(incoming, offers), store)

    def take_in_turn(self, incoming: Sequence[Incoming], offers: Sequence[Offer], store: Store) -> Iterator[Taken]:
        streams = self._streams(incoming, offers)
        for names in _groups(incoming, self.bucket_bytes):
            some = [
                replace(part, fillings=tuple(one for one in part.fillings if one.storage.name in names))
                for part in incoming
            ]
            yield self._taken(some, streams, store)

    def _streams(self, incoming: Sequence[Incoming], offers: Sequence[Offer]) -> "dict[tuple[int, int], _Stream]":
        packed = {offer.rank: offer for offer in offers if isinstance(offer, Packed)}
        return {
            (source, part.rank): _Stream(packed[source], part.rank, moves, self.stream_bytes)
            for part in incoming
            for source, moves in _rows_by_source(part).items()
        }

    def _taken(self, incoming: Sequence[Incoming], streams: "Mapping[tuple[int, int], _Stream]", store: Store) -> Taken:
        moves = {part.rank: _rows_by_source(part) for part in incoming}
        memory, publications, places = [], [], dict[int, Slice]()
        for source in sorted({source for found in moves.values() for source in found}):
            storages: dict[str, Tensor] = {}
            for rank, found in moves.items():
                if source in found:
                    flat = streams[source, rank].read(found[source], store)
                    memory.append(flat)
                    storages |= _unpacked(flat, rank, source, found[source], places)
            publications.append(publish(source, storages, lasting=False))
        moved = tuple(
            replace(part, fillings=tuple(_moved(filling, places) for filling in part.fillings)) for part in incoming
        )
        return Taken(moved, tuple(publications), tuple(memory))


def _put(parts: Sequence[Part], named: Storages, store: Store) -> BatchRef:
    """One bucket; its memory is let go before the next is packed."""
    flat = pack(parts, named, torch.empty(filled_bytes(parts), dtype=torch.uint8))
    return BatchRef.put(Batch({"weight_bytes": Ragged(flat, torch.tensor([len(flat)]))}), store)


def _groups(incoming: Iterable[Incoming], bucket_bytes: int) -> Iterator[set[str]]:
    """Names of storages, in order, that all ranks together fill from at most a bucket, or one larger one."""
    sizes: dict[str, int] = {}
    for filling in (filling for part in incoming for filling in part.fillings):
        num_bytes = sum(move.num_bytes for move in filling.moves)
        sizes[filling.storage.name] = sizes.get(filling.storage.name, 0) + num_bytes
    names, filled = set[str](), 0
    for name, size in sizes.items():
        if names and filled + size > bucket_bytes:
            yield names
            names, filled = set(), 0
        names.add(name)
        filled += size
    if names:
        yield names


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


class _Stream:
    """What one source rank sends to one destination rank: its moves one after another, cut into buckets."""

    def __init__(self, packed: Packed, rank: int, moves: Mapping[int, Move], bucket_bytes: int) -> None:
        """moves: all of this pair of ranks by row, in the plan's order."""
        self._source, self._rank, self._refs = packed.rank, rank, packed.buckets.get(rank, ())
        sizes = [filled_bytes(parts) for parts in cut_moves(_in_wire_order(moves.values()), bucket_bytes)]
        self._ends = list(accumulate(sizes))
        ordered = _rows_in_wire_order(moves)
        starts = accumulate((moves[row].num_bytes for row in ordered), initial=0)
        self._starts = dict(zip(ordered, starts, strict=False))
        self._open: dict[str, tuple[int, Tensor]] = {}
        """By dtype, since wide ones come first on the wire: the bucket that its rows have come to."""
        if len(self._refs) != len(sizes):
            self._refuse(sum(sizes[: len(self._refs)]))

    def read(self, moves: Mapping[int, Move], store: Store) -> Tensor:
        """(bytes,) uint8 in shared memory: some of the rows, in wire order."""
        flat, filled = shared_bytes(self._source, sum(move.num_bytes for move in moves.values())), 0
        for row in _rows_in_wire_order(moves):
            start, stop = self._starts[row], self._starts[row] + moves[row].num_bytes
            while start < stop:
                index = bisect_right(self._ends, start)
                begin = self._ends[index] - self._size(index)
                bucket = self._at(index, moves[row].dtype, store)
                end = min(stop, self._ends[index])
                flat[filled : filled + end - start] = bucket[start - begin : end - begin]
                filled += end - start
                start = end
        return flat

    def _size(self, index: int) -> int:
        return self._ends[index] - (self._ends[index - 1] if index else 0)

    def _at(self, index: int, dtype: str, store: Store) -> Tensor:
        for opened, bucket in self._open.values():
            if opened == index:
                self._open[dtype] = index, bucket
                return bucket
        self._open.pop(dtype, None)  # before the next comes
        self._open[dtype] = index, self._opened(index, store)
        return self._open[dtype][1]

    def _opened(self, index: int, store: Store) -> Tensor:
        """A bucket where the store has it, not copied where it is on this node."""
        place = self._refs[index].places["weight_bytes"]
        ((batch, _),) = store.read([Want(place.blocks[0], ("weight_bytes",), place.row)])
        bucket = batch.ragged("weight_bytes").flat
        if len(bucket) != self._size(index):
            self._refuse(self._ends[-1] + len(bucket) - self._size(index))
        return bucket

    def _refuse(self, came: int) -> NoReturn:
        raise WeightSyncError(
            f"receive: destination rank {self._rank}: {came} bytes came from source rank {self._source}, the plan has "
            f"{self._ends[-1]}; the weights are not to be used"
        )


def _rows_in_wire_order(moves: Mapping[int, Move]) -> list[int]:
    return sorted(moves, key=lambda row: -dtype_of(moves[row].dtype).itemsize)


def _unpacked(
    flat: Tensor, rank: int, source: int, moves: Mapping[int, Move], places: dict[int, Slice]
) -> dict[str, Tensor]:
    """The bytes as one storage a dtype; `places` gets where each row's move lies."""
    storages: dict[str, Tensor] = {}
    start = 0
    for dtype, rows in groupby(_rows_in_wire_order(moves), key=lambda row: moves[row].dtype):
        name, offset = f"{dtype} {len(storages)} for rank {rank}", 0
        for row, move in ((row, moves[row]) for row in rows):
            places[row] = Slice(source, name, offset, row_strides(move.shape))
            offset += move.num_elements
        num_bytes = offset * dtype_of(dtype).itemsize
        storages[name] = flat[start : start + num_bytes].view(dtype_of(dtype))
        start += num_bytes
    return storages


def _moved(filling: Filling, places: Mapping[int, Slice]) -> Filling:
    moves = zip(filling.rows, filling.moves, strict=True)
    return replace(filling, moves=tuple(replace(move, source=places[row]) for row, move in moves))
