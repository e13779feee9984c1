"""One rank's part of a plan: what fills its storages (`Incoming`), and what leaves it (`Outgoing`).

A move is known by its row in `plan.moves`. Sender and receiver each compute a checksum of every move, and the driver
compares them row by row, so a difference names parameter, rank and slice, and a row that is missing was not written.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from hybridflow.errors import WeightSyncError
from hybridflow.resharding.buckets import view
from hybridflow.resharding.layout import Storage, dtype_of, refuse_other_tensors
from hybridflow.resharding.plan import Move, Plan

BLOCK_BYTES = 2 << 20
"""Copied, then hashed while it is still in the core's cache: there a checksum is five times as fast as in memory."""


class Checksum(NamedTuple):
    """Of a move's elements, in the order of its box and the dtype in which it travels. num_bytes: how many were read
    for it, a count and not the plan's number."""

    num_bytes: int
    xxh3_64: int


Checksums = dict[int, Checksum]
"""By row of `plan.moves`."""


@dataclass(frozen=True)
class Filling:
    """One storage of a destination rank and the moves that fill it, with their rows in the plan."""

    storage: Storage
    rows: tuple[int, ...]
    moves: tuple[Move, ...]


@dataclass(frozen=True)
class Incoming:
    """What fills one destination rank, storage by storage in the order of its layout. only: the names of the parameters
    that are filled, where the rank holds the others already; None: all of the model's."""

    rank: int
    fillings: tuple[Filling, ...]
    only: frozenset[str] | None = None

    @cached_property
    def num_bytes(self) -> int:
        return sum(move.num_bytes for filling in self.fillings for move in filling.moves)

    @cached_property
    def sources(self) -> tuple[int, ...]:
        """The source ranks that it reads."""
        return tuple(sorted({move.source.rank for filling in self.fillings for move in filling.moves}))

    @staticmethod
    def of(plan: Plan, rank: int, only: frozenset[str] | None = None) -> "Incoming":
        _refuse_stays(plan)
        rows = np.nonzero(plan.destination.pieces.rank[plan.moves.destination_piece] == rank)[0]
        found: dict[str, tuple[list[int], list[Move]]] = {}
        for row, move in zip(rows.tolist(), plan.as_moves(plan.moves.rows(rows)), strict=True):
            of_storage = found.setdefault(move.destination.storage, ([], []))
            of_storage[0].append(row)
            of_storage[1].append(move)
        fillings = []
        for storage in plan.destination.storages_of(rank):
            its_rows, its_moves = found.get(storage.name, ((), ()))
            fillings.append(Filling(storage, tuple(its_rows), tuple(its_moves)))
        return Incoming(rank, tuple(fillings), only)


@dataclass(frozen=True)
class Outgoing:
    """What leaves one source rank, in the plan's order, and the storages that it leaves from."""

    rank: int
    storages: tuple[Storage, ...]
    rows: tuple[int, ...]
    moves: tuple[Move, ...]

    @cached_property
    def num_bytes(self) -> int:
        return sum(move.num_bytes for move in self.moves)

    @staticmethod
    def of(plan: Plan, rank: int) -> "Outgoing":
        _refuse_stays(plan)
        rows = np.nonzero(plan.source.pieces.rank[plan.moves.source_piece] == rank)[0]
        moves = plan.as_moves(plan.moves.rows(rows))
        return Outgoing(rank, tuple(plan.source.storages_of(rank)), tuple(rows.tolist()), tuple(moves))


def assemble(
    incoming: Incoming, sources: Mapping[int, Mapping[str, Tensor]], into: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor, Checksums]]:
    """Fill this rank's storages one after another; yields (storage, filled (num_elements,), checksums of its moves).

    sources: the source ranks' storages by rank and name. into: live tensors by storage name, contiguous and of any
    shape, to be filled in place; by default each storage is new memory, the caller's to keep or drop, so that one at a
    time costs no more than one storage. The checksums are of the filled memory, read back.
    """
    for filling in incoming.fillings:
        flat = _new(filling.storage) if into is None else _given(filling.storage, into)
        checksums = _fill(flat, filling, incoming.rank, sources)
        yield filling.storage.name, flat, checksums
        del flat  # before the next is made


def _fill(flat: Tensor, filling: Filling, rank: int, sources: Mapping[int, Mapping[str, Tensor]]) -> Checksums:
    for start, stop in filling.storage.padding:
        flat[start:stop].zero_()
    checksums = {}
    for row, move in zip(filling.rows, filling.moves, strict=True):
        source = view(_source_of(rank, move, sources), move.source, move.shape)
        checksums[row] = _copied(source, view(flat, move.destination, move.shape), dtype_of(move.dtype))
    return checksums


def expected_checksums(outgoing: Outgoing, storages: Mapping[str, Tensor]) -> Checksums:
    """Of what leaves this rank, from its storages by name. A slice that goes to several ranks is read once."""
    refuse_other_tensors(outgoing.storages, storages, "send: source")
    known: dict[tuple[object, ...], Checksum] = {}
    checksums = {}
    for row, move in zip(outgoing.rows, outgoing.moves, strict=True):
        key = (move.source, move.shape, move.dtype)
        if key not in known:
            known[key] = checksum(view(storages[move.source.storage], move.source, move.shape), dtype_of(move.dtype))
        checksums[row] = known[key]
    return checksums


def checksum(elements: Tensor, dtype: torch.dtype) -> Checksum:
    """Of the elements in order, as `dtype`."""
    digest, num_bytes = xxhash.xxh3_64(), 0
    for (block,) in _blocks(elements):
        num_bytes += _update(digest, block, dtype)
    return Checksum(num_bytes, digest.intdigest())


def _copied(source: Tensor, destination: Tensor, dtype: torch.dtype) -> Checksum:
    """The checksum of the destination, each block read back at once."""
    digest, num_bytes = xxhash.xxh3_64(), 0
    for out, into in _blocks(source, destination):
        into.copy_(out)
        num_bytes += _update(digest, into, dtype)
    return Checksum(num_bytes, digest.intdigest())


def _update(digest: "xxhash.xxh3_64", block: Tensor, dtype: torch.dtype) -> int:
    data = block.to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy().data
    digest.update(data)
    return len(data)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same elements of each of these tensors of one shape, some BLOCK_BYTES at a time, in flat order."""
    if all(tensor.is_contiguous() for tensor in tensors):
        tensors = tuple(tensor.view(-1) for tensor in tensors)
    while tensors[0].ndim > 1 and tensors[0].shape[0] == 1:
        tensors = tuple(tensor[0] for tensor in tensors)
    length = tensors[0].shape[0]
    step = max(1, BLOCK_BYTES * length // max(1, max(tensor.nbytes for tensor in tensors)))
    for start in range(0, length, step):
        yield tuple(tensor[start : start + step] for tensor in tensors)


def _new(storage: Storage) -> Tensor:
    return torch.empty(storage.num_elements, dtype=dtype_of(storage.dtype))


def _given(storage: Storage, into: Mapping[str, Tensor]) -> Tensor:
    tensor = into.get(storage.name)  # one look-up: it may make the memory
    refuse_other_tensors([storage], {} if tensor is None else {storage.name: tensor}, "receive: destination")
    assert tensor is not None
    return tensor.detach().view(-1)


def _source_of(rank: int, move: Move, sources: Mapping[int, Mapping[str, Tensor]]) -> Tensor:
    tensor = sources.get(move.source.rank, {}).get(move.source.storage)
    if tensor is None:
        raise WeightSyncError(
            f"receive: destination rank {rank}: source rank {move.source.rank} published no "
            f"{move.source.storage!r}, which the plan reads; plan again from the ranks' layouts"
        )
    return tensor


def _refuse_stays(plan: Plan) -> None:
    if len(plan.stays):
        raise WeightSyncError(
            "receive: the plan counts on memory that source and destination share; plan without it, since an engine "
            "has memory of its own"
        )
