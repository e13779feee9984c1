"""Which index ranges of which parameter each rank holds, and where they lie in its local tensors.

A layout is built from numbers (shards.py) or read from a live engine by a reader beside it, and both use
`LayoutBuilder`. The columns are numpy arrays, so that a layout of 32 ranks and 500 million elements is some thousand
rows and can be planned in a second.

Names. A *parameter* is a tensor of the model under its Hugging Face name. A *storage* is one contiguous local tensor of
one rank, seen flat: a whole parameter, a fused one (`qkv_proj.weight` holds slices of three), or a ZeRO flat buffer. A
*piece* is one box of one parameter as it lies in one storage.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np
import torch

from hybridflow.errors import WeightSyncError
from hybridflow.resharding.boxes import Box, Corner, Ints, intersect, interval_boxes, row_strides, volumes
from hybridflow.resharding.cuts import Shard


@dataclass(frozen=True)
class Parameter:
    """A tensor of the model: its global shape and torch's name of its dtype (`float32`)."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * dtype_of(self.dtype).itemsize


@dataclass(frozen=True)
class Storage:
    """One contiguous local tensor of one rank, seen flat.

    padding: flat intervals [start, stop) that belong to no parameter; in a destination they are set to zero.
    """

    rank: int
    name: str
    num_elements: int
    dtype: str
    padding: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, eq=False)
class Pieces:
    """One row a piece, sorted by parameter, then rank. N rows, int64.

    parameter (N,) and storage (N,) are indices into the layout's. low, high (N, 3): the box on three axes.
    offset (N,): flat index of the low corner in the storage. strides (N, 3): elements between neighbours there.
    """

    parameter: Ints
    rank: Ints
    low: Ints
    high: Ints
    storage: Ints
    offset: Ints
    strides: Ints

    def __len__(self) -> int:
        return len(self.parameter)

    @cached_property
    def volume(self) -> Ints:
        """(N,) elements."""
        return volumes(self.low, self.high)


@dataclass(frozen=True, eq=False)
class Layout:
    parameters: tuple[Parameter, ...]
    storages: tuple[Storage, ...]
    pieces: Pieces
    ranks: tuple[int, ...]

    @cached_property
    def first_piece(self) -> Ints:
        """(P + 1,): the pieces of parameter i are rows [first_piece[i], first_piece[i + 1])."""
        return np.searchsorted(self.pieces.parameter, np.arange(len(self.parameters) + 1)).astype(np.int64)

    @cached_property
    def index_of(self) -> Mapping[str, int]:
        return {parameter.name: index for index, parameter in enumerate(self.parameters)}

    @cached_property
    def num_bytes(self) -> int:
        """Of the model once, without padding or replicas."""
        return sum(parameter.num_bytes for parameter in self.parameters)

    def storages_of(self, rank: int) -> Iterator[Storage]:
        return (storage for storage in self.storages if storage.rank == rank)

    def bytes_per_rank(self) -> dict[int, int]:
        """What each rank's storages occupy, padding included."""
        held = dict.fromkeys(self.ranks, 0)
        for storage in self.storages:
            held[storage.rank] += storage.num_elements * dtype_of(storage.dtype).itemsize
        return held

    def only(self, names: Collection[str]) -> "Layout":
        """Of these parameters alone. Raises WeightSyncError where a storage holds one of them and another."""
        kept = np.array([parameter.name in names for parameter in self.parameters], dtype=bool)
        rows = kept[self.pieces.parameter]
        stored = np.isin(np.arange(len(self.storages)), self.pieces.storage[rows])
        if mixed := sorted({*self.pieces.storage[rows].tolist()} & {*self.pieces.storage[~rows].tolist()}):
            held = self.storages[mixed[0]]
            raise WeightSyncError(
                f"layout: rank {held.rank}, {held.name}: it holds parameters that are to move and others that are not"
            )
        columns = {name: getattr(self.pieces, name)[rows] for name in Pieces.__annotations__}
        columns["parameter"] = (np.cumsum(kept) - 1)[columns["parameter"]]
        columns["storage"] = (np.cumsum(stored) - 1)[columns["storage"]]
        return Layout(
            tuple(p for p, keeps in zip(self.parameters, kept, strict=True) if keeps),
            tuple(s for s, keeps in zip(self.storages, stored, strict=True) if keeps),
            Pieces(**columns),
            self.ranks,
        )

    def allocate(self, rank: int, device: str = "cpu") -> dict[str, torch.Tensor]:
        """This rank's storages by name, (num_elements,) each, zeros."""
        return {
            storage.name: torch.zeros(storage.num_elements, dtype=dtype_of(storage.dtype), device=device)
            for storage in self.storages_of(rank)
        }

    def check_written_once(self) -> None:
        """Raise WeightSyncError unless pieces and padding fill every storage exactly once.

        A layout that is written to must have this property; one that is only read may show a storage under two names
        (tied embeddings).
        """
        storage, start, length = self._runs()
        order = np.lexsort((start, storage))
        storage, start, stop = storage[order], start[order], (start + length)[order]
        sizes = np.array([held.num_elements for held in self.storages], dtype=np.int64)
        expected = np.where(np.diff(storage, prepend=-1) != 0, 0, np.roll(stop, 1))
        ends = np.zeros(len(sizes), dtype=np.int64)
        np.maximum.at(ends, storage, stop)
        wrong = {*storage[start != expected].tolist(), *np.nonzero(ends != sizes)[0].tolist()}
        if wrong:
            held = self.storages[min(wrong)]
            raise WeightSyncError(
                f"layout: rank {held.rank}, {held.name}: its {held.num_elements} elements are not filled exactly once "
                "by slices of parameters and padding; two slices overlap there, or a gap is not declared as padding"
            )

    def _runs(self) -> tuple[Ints, Ints, Ints]:
        """Contiguous runs (storage, start, length) of all pieces and paddings, each of shape (R,)."""
        pieces = self.pieces
        size = pieces.high - pieces.low
        along_c, along_b = size[:, 2], size[:, 1]
        # An axis of one index continues any run; axis b continues a run when its stride is the run's length.
        b_joins = (along_b == 1) | (pieces.strides[:, 1] == along_c)
        length = np.where(b_joins, along_c * along_b, along_c)
        num_b = np.where(b_joins, 1, along_b)
        a_joins = b_joins & ((size[:, 0] == 1) | (pieces.strides[:, 0] == length))
        length = np.where(a_joins, length * size[:, 0], length)
        num_a = np.where(a_joins, 1, size[:, 0])
        count = num_a * num_b
        row = np.repeat(np.arange(len(pieces)), count)
        within = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        a, b = np.divmod(within, num_b[row])
        start = pieces.offset[row] + a * pieces.strides[row, 0] + b * pieces.strides[row, 1]
        padding = [(i, low, high - low) for i, held in enumerate(self.storages) for low, high in held.padding]
        pads = np.array(padding, dtype=np.int64).reshape(-1, 3)
        return (
            np.concatenate([pieces.storage[row], pads[:, 0]]),
            np.concatenate([start, pads[:, 1]]),
            np.concatenate([length[row], pads[:, 2]]),
        )


class LayoutBuilder:
    """Collects the storages of all ranks: `open` one, `append` what lies in it in order, `close` it; then `build`."""

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self.parameters = tuple(parameters)
        self._index = {parameter.name: index for index, parameter in enumerate(self.parameters)}
        if len(self._index) != len(self.parameters):
            twice = sorted({p.name for p in self.parameters if self.parameters[self._index[p.name]] is not p})
            raise WeightSyncError(f"layout: parameters named twice: {', '.join(twice)}")
        self._storages: list[Storage] = []
        self._names: set[tuple[int, str]] = set()
        self._rows: list[tuple[int, ...]] = []
        self._open: tuple[int, str, str] | None = None
        self._end = 0
        self._padding: list[tuple[int, int]] = []

    def open(self, rank: int, storage: str, dtype: str) -> None:
        assert self._open is None, f"{self._open} is still open"
        if (rank, storage) in self._names:
            raise WeightSyncError(f"layout: rank {rank} has two local tensors named {storage!r}")
        self._open, self._end, self._padding = (rank, storage, dtype), 0, []

    def append(self, name: str, shard: Shard, start: int = 0, stop: int | None = None) -> None:
        """The flat interval [start, stop) of this shard (all of it by default) comes next in the open storage."""
        assert self._open is not None, "no storage is open"
        stop = shard.num_elements if stop is None else stop
        if name not in self._index:
            raise WeightSyncError(f"layout: rank {self._open[0]}: {name!r} is not a parameter of this model")
        strides = row_strides(shard.shape)
        for interval in interval_boxes(shard.shape, start, min(stop, shard.num_real)):
            for box, at in shard.parts:
                self._append_part(self._index[name], box, at, interval, strides, self._end - start)
        first_pad = max(start, min(stop, shard.num_real))
        self._end += stop - start
        self.pad(stop - first_pad, counted=True)

    def _append_part(self, parameter: int, box: Box, at: Corner, within: Box, strides: Corner, base: int) -> None:
        size = [high - low for low, high in zip(*box, strict=True)]
        common = intersect((at, (at[0] + size[0], at[1] + size[1], at[2] + size[2])), within)
        if common is None:
            return
        shift = [low - local for low, local in zip(box[0], at, strict=True)]
        low = [local + moved for local, moved in zip(common[0], shift, strict=True)]
        high = [local + moved for local, moved in zip(common[1], shift, strict=True)]
        offset = base + sum(local * stride for local, stride in zip(common[0], strides, strict=True))
        assert self._open is not None
        self._rows.append((parameter, self._open[0], *low, *high, len(self._storages), offset, *strides))

    def pad(self, num_elements: int, counted: bool = False) -> None:
        """The next elements of the open storage belong to nobody. counted: the last elements appended are they."""
        start = self._end - num_elements if counted else self._end
        self._end = start + num_elements
        if num_elements:
            self._padding.append((start, self._end))

    def close(self) -> None:
        assert self._open is not None, "no storage is open"
        rank, name, dtype = self._open
        self._names.add((rank, name))
        self._storages.append(Storage(rank, name, self._end, dtype, tuple(self._padding)))
        self._open = None

    def build(self, ranks: Sequence[int]) -> Layout:
        """The layout of these ranks; ranks that hold nothing are named here only."""
        assert self._open is None, f"{self._open} is still open"
        table = np.array(self._rows, dtype=np.int64).reshape(-1, 13)
        table = table[np.lexsort((table[:, 9], table[:, 8], table[:, 1], table[:, 0]))]
        pieces = Pieces(
            parameter=table[:, 0],
            rank=table[:, 1],
            low=table[:, 2:5],
            high=table[:, 5:8],
            storage=table[:, 8],
            offset=table[:, 9],
            strides=table[:, 10:13],
        )
        return Layout(self.parameters, tuple(self._storages), pieces, tuple(ranks))


def renumbered(layout: Layout, offset: int) -> Layout:
    """The same layout with every rank's number raised by `offset`."""
    storages = tuple(replace(storage, rank=storage.rank + offset) for storage in layout.storages)
    pieces = replace(layout.pieces, rank=layout.pieces.rank + offset)
    return Layout(layout.parameters, storages, pieces, tuple(rank + offset for rank in layout.ranks))


def combined(layouts: Sequence[Layout]) -> Layout:
    """One layout of the ranks of all of these, each of which describes its own ranks of one model.

    Raises WeightSyncError where two name the same rank, or list other parameters.
    """
    if not layouts:
        raise WeightSyncError("layout: nothing to combine; every group has at least one rank")
    parameters = layouts[0].parameters
    ranks = [rank for layout in layouts for rank in layout.ranks]
    if twice := sorted({rank for rank in ranks if ranks.count(rank) > 1}):
        raise WeightSyncError(f"layout: ranks {twice} are described twice; each rank describes itself")
    for layout in layouts[1:]:
        odd = [one.name for one, other in zip(parameters, layout.parameters, strict=False) if one != other]
        if odd or len(parameters) != len(layout.parameters):
            found = odd[0] if odd else f"{len(parameters)} and {len(layout.parameters)} of them"
            raise WeightSyncError(
                f"layout: ranks {layouts[0].ranks} and {layout.ranks} list different parameters (first: {found}); all "
                "ranks of a group list the model's parameters in one order, those they do not hold included"
            )
    first_storage = np.cumsum([0, *(len(layout.storages) for layout in layouts[:-1])])
    columns = {
        name: np.concatenate([getattr(layout.pieces, name) for layout in layouts]) for name in Pieces.__annotations__
    }
    columns["storage"] = columns["storage"] + np.repeat(first_storage, [len(layout.pieces) for layout in layouts])
    order = np.lexsort((columns["offset"], columns["storage"], columns["rank"], columns["parameter"]))
    pieces = Pieces(**{name: column[order] for name, column in columns.items()})
    return Layout(parameters, tuple(s for layout in layouts for s in layout.storages), pieces, tuple(ranks))


def refuse_other_tensors(storages: Iterable[Storage], tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise WeightSyncError unless a rank has all of these storages, each contiguous, of its size and dtype."""
    for storage in storages:
        tensor = tensors.get(storage.name)
        at = f"{where} rank {storage.rank}, {storage.name}"
        if tensor is None:
            raise WeightSyncError(f"{at}: the layout has it, the rank does not")
        found = (tensor.numel(), tensor.dtype)
        if found != (storage.num_elements, dtype_of(storage.dtype)) or not tensor.is_contiguous():
            raise WeightSyncError(
                f"{at}: {found[0]} elements of {found[1]}{'' if tensor.is_contiguous() else ', not contiguous'}; the "
                f"layout has {storage.num_elements} contiguous ones of {storage.dtype}"
            )


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype of this name; WeightSyncError where there is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise WeightSyncError(f"layout: {name!r} is no dtype of torch (examples: float32, bfloat16)")
    return dtype
