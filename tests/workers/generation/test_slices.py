import pytest
import torch

from hybridflow.errors import WeightSyncError
from hybridflow.resharding.boxes import three_axes
from hybridflow.resharding.layout import Parameter
from workers.generation.slices import box_of, in_storage, layout_of, merged, parts, place, view_of

MATRIX = torch.arange(24.0).reshape(4, 6)
EXPERTS = torch.arange(60.0).reshape(3, 4, 5)


@pytest.mark.parametrize(
    ("whole", "view", "box"),
    [
        (MATRIX, MATRIX[1:3], ((1, 0, 0), (3, 6, 1))),
        (MATRIX, MATRIX[:, 2:4], ((0, 2, 0), (4, 4, 1))),
        (MATRIX, MATRIX.t()[1:2], ((0, 1, 0), (4, 2, 1))),
        (MATRIX, MATRIX[2], ((2, 0, 0), (3, 6, 1))),
        (MATRIX, MATRIX.view(-1), ((0, 0, 0), (4, 6, 1))),
        (MATRIX, MATRIX[1:1], None),
        (EXPERTS, EXPERTS[1, :2], ((1, 0, 0), (2, 2, 5))),
        (EXPERTS, EXPERTS[2][:, 3:], ((2, 0, 3), (3, 4, 5))),
    ],
)
def test_a_view_is_a_box(whole, view, box):
    assert box_of(whole.shape, view_of(view)) == box


@pytest.mark.parametrize("view", [MATRIX[::2], MATRIX[:, ::3], MATRIX.view(-1)[4:9], MATRIX[:1].expand(4, 6)])
def test_a_view_that_is_no_box_is_refused(view):
    with pytest.raises(ValueError, match="is no box"):
        box_of(MATRIX.shape, view_of(view))


def test_neighbouring_boxes_become_one():
    halves = [box_of(EXPERTS.shape, view_of(EXPERTS[e, a : a + 2])) for e in range(3) for a in (2, 0)]
    assert merged(halves) == [((0, 0, 0), (3, 4, 5))]
    assert merged([*halves[:2], *halves[:2]]) == [((0, 0, 0), (1, 4, 5))]
    apart = [box_of(EXPERTS.shape, view_of(EXPERTS[e, a : a + 1])) for e in range(3) for a in (0, 2)]
    assert merged(apart) == [((0, 0, 0), (3, 1, 5)), ((0, 2, 0), (3, 3, 5))]


def test_a_storage_is_put_where_its_boxes_are():
    boxes = merged(box_of(EXPERTS.shape, view_of(EXPERTS[e, a : a + 1])) for e in range(3) for a in (0, 2))
    full = torch.full((3, 4, 5), -1.0)
    place(full, boxes, torch.cat([EXPERTS[:, :1].reshape(-1), EXPERTS[:, 2:3].reshape(-1)]))
    expected = torch.full((3, 4, 5), -1.0)
    expected[:, ::2] = EXPERTS[:, ::2]
    assert torch.equal(full, expected)


def test_a_layout_has_one_storage_a_parameter_and_rank_that_holds_some_of_it():
    parameters = [Parameter("a", (4, 6)), Parameter("b", (3, 4, 5))]
    whole = {"b": [((0, 0, 0), (3, 4, 5))]}
    first = {"a": [((0, 0, 0), (4, 6, 1))], "b": [((0, 0, 0), (3, 1, 5)), ((0, 2, 0), (3, 3, 5))]}
    layout = layout_of(parameters, [first, whole])
    assert [(s.rank, s.name, s.num_elements) for s in layout.storages] == [(0, "a", 24), (0, "b", 30), (1, "b", 60)]
    layout.check_written_once()
    assert layout.ranks == (0, 1)


def test_a_parameter_that_no_rank_holds_completely_is_named():
    with pytest.raises(WeightSyncError, match="a: the engine's tensor ranks load 12 of its 24 elements"):
        layout_of([Parameter("a", (4, 6))], [{"a": [((0, 0, 0), (2, 6, 1))]}] * 2)


@pytest.mark.parametrize(
    ("whole", "boxes", "views"),
    [
        (MATRIX, [((1, 0, 0), (3, 6, 1))], [MATRIX[1:3], MATRIX[2], MATRIX[1:3, 2:4], MATRIX[1:3].view(-1)]),
        (MATRIX, [((0, 2, 0), (4, 5, 1))], [MATRIX[:, 2:5], MATRIX[1:, 3:4], MATRIX[:, 2:5].t(), MATRIX[3, 2:5]]),
        (EXPERTS, [((0, 0, 0), (3, 1, 5)), ((0, 2, 0), (3, 4, 5))], [EXPERTS[1, :1], EXPERTS[2, 2:], EXPERTS[:, 3]]),
        (EXPERTS, [((0, 0, 2), (3, 4, 5))], [EXPERTS[1, :, 3:], EXPERTS[2, 1, 2:], EXPERTS[:, :, 2:5]]),
    ],
)
def test_a_view_of_a_parameter_is_one_of_the_storage_that_holds_its_boxes(whole, boxes, views):
    axes = whole.view(three_axes(whole.shape))
    storage = torch.cat([axes[a:x, b:y, c:z].reshape(-1) for (a, b, c), (x, y, z) in boxes])
    assert sum(part.numel() for _, part in parts(boxes, storage)) == storage.numel()
    for view in views:
        offset, size, stride = in_storage(whole.shape, boxes, view_of(view))
        assert torch.equal(storage.as_strided(size, stride, offset), view)


def test_a_view_outside_of_all_boxes_is_a_bug():
    with pytest.raises(AssertionError, match="is in none of"):
        in_storage(MATRIX.shape, [((1, 0, 0), (3, 6, 1))], view_of(MATRIX[:1]))
