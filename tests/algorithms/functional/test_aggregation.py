"""Aggregation modes as weights of rows: literal numbers, a loop, and rows without a trainable token."""

import math

import pytest
import torch

from algorithms.functional.aggregation import row_weights

LOSS = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])


@pytest.mark.parametrize(
    ("mode", "want"),
    [("token_mean", 3.0), ("sequence_mean_token_sum", 7.5), ("sequence_mean_token_mean", 3.25), ("constant", 15 / 8)],
)
def test_aggregation_with_the_last_token_of_the_last_row_masked(mode, want):
    weights = row_weights(mode, MASK.sum(1), max_length=4)
    assert float((weights[:, None] * LOSS)[MASK].sum()) == pytest.approx(want)


@pytest.mark.parametrize(
    ("mode", "want"), [("token_mean", 3.6), ("sequence_mean_token_sum", 9.0), ("sequence_mean_token_mean", 3.25)]
)
def test_aggregation_figures_of_the_formulas_page(mode, want):
    """[[1,2,3],[4,5,6]] with the last token of row 1 (counting from 1) masked."""
    mask = torch.tensor([[True, True, False], [True, True, True]])
    weights = row_weights(mode, mask.sum(1))
    assert float((weights[:, None] * LOSS)[mask].sum()) == pytest.approx(want)


def test_prompt_mean_against_a_loop():
    lengths, groups = torch.tensor([3, 1, 2, 0, 0]), torch.tensor([4, 4, 9, 9, 2])
    got = row_weights("prompt_mean", lengths, groups)
    torch.testing.assert_close(got, torch.tensor([1 / 8, 1 / 8, 1 / 4, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "prompt_mean"])
def test_an_empty_row_changes_no_other_weight(mode):
    lengths, groups = torch.tensor([3, 1, 2]), torch.tensor([0, 0, 1])
    alone = row_weights(mode, lengths, groups)
    beside = row_weights(mode, torch.tensor([3, 0, 1, 2]), torch.tensor([0, 5, 0, 1]))
    torch.testing.assert_close(alone, beside[[0, 2, 3]])
    assert beside[1] == 0 and math.isfinite(float(beside.sum()))


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "prompt_mean"])
def test_an_empty_shard_has_no_weights(mode):
    nothing = torch.zeros(0, dtype=torch.int64)
    assert row_weights(mode, nothing, nothing).shape == (0,)
