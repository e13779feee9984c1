"""Whole named weights in one flat buffer of bytes, with a manifest that says where each tensor lies in it: how a test
or a check on demand hands an engine's processes weights to compare theirs with."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes. A tensor viewed from a flat buffer must start at a multiple of its element size; 64 is a cache line."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the buffer: `dtype` is torch's name (`float32`), `offset` is in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return prod(self.shape) * dtype.itemsize


def lay_out(weights: Iterable[tuple[str, Tensor]]) -> tuple[tuple[Entry, ...], int]:
    """Where each tensor would lie in one buffer, and the buffer's bytes."""
    entries, end = [], 0
    for name, tensor in weights:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(Entry(name, dtype, tuple(tensor.shape), start))
        end = start + entries[-1].num_bytes
    return tuple(entries), end


def as_bytes(tensor: Tensor) -> Tensor:
    """(bytes,) uint8 on the CPU; a view where the tensor is contiguous and on the CPU already."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def fill(flat: Tensor, manifest: Sequence[Entry], weights: Mapping[str, Tensor]) -> None:
    """Copy each named tensor to its place in `flat` (bytes,)."""
    for entry in manifest:
        flat[entry.offset : entry.offset + entry.num_bytes] = as_bytes(weights[entry.name])


def unpack(flat: Tensor, manifest: Iterable[Entry]) -> dict[str, Tensor]:
    """The named tensors, as views of `flat` (bytes,) uint8."""
    return {
        entry.name: flat[entry.offset : entry.offset + entry.num_bytes]
        .view(getattr(torch, entry.dtype))
        .reshape(entry.shape)
        for entry in manifest
    }
