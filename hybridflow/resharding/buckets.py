"""Moves cut into buckets of bounded size, for transports that send messages: packed without gaps, so that the bytes of
all buckets are exactly those of the moves."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hybridflow.resharding.boxes import Corner, interval_boxes
from hybridflow.resharding.layout import dtype_of
from hybridflow.resharding.plan import Move, Slice

Storages = Mapping[int, Mapping[str, Tensor]]
"""Local tensors by rank and storage name, contiguous, of any shape."""


@dataclass(frozen=True)
class Part:
    """Elements [start, stop) of a move in the flat order of its box, at `at` bytes into a bucket."""

    move: Move
    start: int
    stop: int
    at: int

    @property
    def num_bytes(self) -> int:
        return (self.stop - self.start) * dtype_of(self.move.dtype).itemsize


def cut_moves(moves: Sequence[Move], capacity: int) -> Iterator[list[Part]]:
    """The moves one after another, cut into buckets of at most `capacity` bytes. Wide dtypes come first in a pair of
    processes, so every part starts at a multiple of its element size without a gap."""
    parts: list[Part] = []
    filled = 0
    for move in moves:
        start, itemsize = 0, dtype_of(move.dtype).itemsize
        while start < move.num_elements:
            room = (capacity - filled) // itemsize
            if room == 0:
                yield parts
                parts, filled = [], 0
                continue
            stop = min(start + room, move.num_elements)
            parts.append(Part(move, start, stop, filled))
            filled += parts[-1].num_bytes
            start = stop
    if parts:
        yield parts


def pack(parts: Sequence[Part], source: Storages, bucket: Tensor) -> Tensor:
    """The parts' elements at their places in the bucket (bytes,) uint8; returns what is filled of it."""
    for part in parts:
        for where, shape, elements in _boxes(part, part.move.source, bucket):
            elements.copy_(view(source[where.rank][where.storage], where, shape))
    return bucket[: filled_bytes(parts)]


def unpack(parts: Sequence[Part], bucket: Tensor, destination: Storages) -> None:
    for part in parts:
        for where, shape, elements in _boxes(part, part.move.destination, bucket):
            view(destination[where.rank][where.storage], where, shape).copy_(elements)


def _boxes(part: Part, whole: Slice, bucket: Tensor) -> Iterator[tuple[Slice, Corner, Tensor]]:
    """The boxes of a part of a move as (slice of the storage, shape, elements of the bucket in that shape)."""
    flat = bucket[part.at : part.at + part.num_bytes].view(dtype_of(part.move.dtype))
    begin = 0
    for low, high in interval_boxes(part.move.shape, part.start, part.stop):
        shape = (high[0] - low[0], high[1] - low[1], high[2] - low[2])
        offset = whole.offset + sum(index * stride for index, stride in zip(low, whole.strides, strict=True))
        size = shape[0] * shape[1] * shape[2]
        yield Slice(whole.rank, whole.storage, offset, whole.strides), shape, flat[begin : begin + size].view(shape)
        begin += size


def view(storage: Tensor, where: Slice, shape: Corner) -> Tensor:
    """This slice of its storage, whose shape does not matter."""
    tensor = storage.detach()
    return tensor.as_strided(shape, where.strides, tensor.storage_offset() + where.offset)


def filled_bytes(parts: Sequence[Part]) -> int:
    return parts[-1].at + parts[-1].num_bytes
