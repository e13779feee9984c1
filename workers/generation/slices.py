"""The slices of Hugging Face parameters that an engine's ranks hold: from views to boxes, from boxes to a layout.

A rank's slice of a parameter is a list of boxes (`hybridflow.resharding.boxes`), which lie one after the other, each
contiguous, in a storage of the parameter's name.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import TypeAlias

from torch import Tensor

from hybridflow.errors import WeightSyncError
from hybridflow.resharding.boxes import Box, Corner, row_strides, three_axes, volume
from hybridflow.resharding.cuts import Shard
from hybridflow.resharding.layout import Layout, LayoutBuilder, Parameter

View: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...]]
"""(offset, size, stride) in elements of one contiguous tensor, as `torch.as_strided` takes them."""


def view_of(tensor: Tensor) -> View:
    return int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride())


def box_of(shape: Sequence[int], view: View) -> Box | None:
    """The box of a contiguous parameter of this shape that the view shows; None when it shows no element.

    Raises ValueError when what it shows is no box: its elements, in rising order, must be those of the box.
    """
    offset, size, stride = view
    if not prod(size):
        return None
    axes = three_axes(shape)
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    low, end = _corner(offset, axes), _corner(last, axes)
    box = (low, (end[0] + 1, end[1] + 1, end[2] + 1))
    lengths = [high - start for start, high in zip(*box, strict=True)]
    if _runs(size, stride) != _runs(lengths, row_strides(axes)):
        raise ValueError(f"a view of sizes {size} and strides {stride} at {offset} of {tuple(shape)} is no box")
    return box


def in_storage(shape: Sequence[int], boxes: Sequence[Box], view: View) -> View:
    """What the view shows of a contiguous parameter of this shape, as a view of the storage that holds these boxes of
    it one after another. It must lie in one of them, and show elements."""
    offset, size, stride = view
    axes, start = three_axes(shape), 0
    low = _corner(offset, axes)
    for box in boxes:
        if all(a <= index < b for a, index, b in zip(box[0], low, box[1], strict=True)):
            a, b, c = (high - first for first, high in zip(*box, strict=True))
            steps = [_dot(_corner(step, axes), row_strides((a, b, c))) for step in stride]
            inside = (low[0] - box[0][0], low[1] - box[0][1], low[2] - box[0][2])
            return start + _dot(inside, row_strides((a, b, c))), size, tuple(steps)
        start += volume(box)
    raise AssertionError(f"a view at {low} of {tuple(shape)} is in none of {boxes}")


def _dot(corner: Corner, strides: Corner) -> int:
    return sum(index * step for index, step in zip(corner, strides, strict=True))


def _corner(index: int, axes: Corner) -> Corner:
    a, rest = divmod(index, axes[1] * axes[2])
    return a, *divmod(rest, axes[2])


def _runs(size: Sequence[int], stride: Sequence[int]) -> list[tuple[int, int]]:
    """The same elements with as few axes as can be: (size, stride), largest stride first."""
    found: list[tuple[int, int]] = []
    axes = sorted(zip(size, stride, strict=True), key=lambda axis: -axis[1])
    for count, step in (axis for axis in axes if axis[0] != 1):
        if found and found[-1][1] == count * step:
            found[-1] = (found[-1][0] * count, step)
        else:
            found.append((count, step))
    return found


def difference_box(box: Box, ours: Tensor, wanted: Tensor) -> tuple[Corner, Corner] | None:
    """Low and high corner of the elements of `box` that differ between two views of it; None when none does."""
    lengths = [high - low for low, high in zip(*box, strict=True)]
    where = (~(ours == wanted)).reshape(lengths).nonzero()  # NaN is a difference
    if not len(where):
        return None
    first, last = where.amin(0).tolist(), where.amax(0).tolist()
    low = [start + index for start, index in zip(box[0], first, strict=True)]
    high = [start + index + 1 for start, index in zip(box[0], last, strict=True)]
    return (low[0], low[1], low[2]), (high[0], high[1], high[2])


def merged(boxes: Iterable[Box]) -> list[Box]:
    """The same elements in fewer boxes: neighbours that differ along one axis only become one. Sorted; twins go."""
    found = sorted(set(boxes))
    for axis in (2, 1, 0):
        ordered = sorted(found, key=lambda box: (_without(box[0], axis), _without(box[1], axis), box[0][axis]))
        found = []
        for box in ordered:
            if found and _continues(found[-1], box, axis):
                found[-1] = (found[-1][0], box[1])
            else:
                found.append(box)
    return sorted(found)


def _without(corner: Corner, axis: int) -> tuple[int, ...]:
    return corner[:axis] + corner[axis + 1 :]


def _continues(box: Box, following: Box, axis: int) -> bool:
    same = all(_without(a, axis) == _without(b, axis) for a, b in zip(box, following, strict=True))
    return same and box[1][axis] == following[0][axis]


def from_lists(boxes: Mapping[str, Iterable[Sequence[Sequence[int]]]]) -> dict[str, list[Box]]:
    """Boxes by parameter as they were before an RPC made lists of their tuples."""
    return {
        name: [((a, b, c), (x, y, z)) for (a, b, c), (x, y, z) in of_parameter] for name, of_parameter in boxes.items()
    }


def layout_of(parameters: Sequence[Parameter], ranks: Sequence[Mapping[str, Sequence[Box]]]) -> Layout:
    """The layout of tensor ranks 0, 1, ... that hold these boxes, a storage a parameter. A rank without a part of a
    parameter (a vocabulary's padding only) has no storage for it."""
    builder = LayoutBuilder(parameters)
    for rank, held in enumerate(ranks):
        for parameter in parameters:
            boxes = held.get(parameter.name, ())
            if not boxes:
                continue
            builder.open(rank, parameter.name, parameter.dtype)
            for box in boxes:
                a, b, c = (high - low for low, high in zip(*box, strict=True))
                builder.append(parameter.name, Shard((a, b, c), ((box, (0, 0, 0)),), a * b * c))
            builder.close()
    _refuse_homeless(parameters, ranks)
    return builder.build(range(len(ranks)))


def _refuse_homeless(parameters: Sequence[Parameter], ranks: Sequence[Mapping[str, Sequence[Box]]]) -> None:
    """The boxes of one rank are disjoint, so a parameter is held when all ranks together have at least its elements."""
    for parameter in parameters:
        boxes = {box for held in ranks for box in held.get(parameter.name, ())}
        if sum(map(volume, boxes)) < parameter.num_elements:
            raise WeightSyncError(
                f"rollout.layout: {parameter.name}: the engine's tensor ranks load {sum(map(volume, boxes))} of its "
                f"{parameter.num_elements} elements; this model's loader is not one that can be planned for"
            )


def place(full: Tensor, boxes: Sequence[Box], flat: Tensor) -> None:
    """Copy a storage (n,), boxes one after the other, to its place in a parameter of its full shape."""
    seen = full.view(three_axes(full.shape))
    start = 0
    for box, part in parts(boxes, flat):
        (a, b, c), (x, y, z) = box
        seen[a:x, b:y, c:z] = part
        start += part.numel()
    assert start == flat.numel(), f"{flat.numel()} elements for boxes of {start}"


def parts(boxes: Sequence[Box], flat: Tensor) -> Iterator[tuple[Box, Tensor]]:
    """Each box with its part of the storage (n,), shaped like the box."""
    start = 0
    for box in boxes:
        stop = start + volume(box)
        yield box, flat[start:stop].view([high - low for low, high in zip(*box, strict=True)])
        start = stop
