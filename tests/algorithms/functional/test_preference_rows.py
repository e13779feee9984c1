"""Losses of judged rows (KTO, one side of unpaired AOT; BCO's shift): literal numbers, loops, finite differences."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithms.functional import preference_losses
from algorithms.functional.preference_losses import PairSettings


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def sigma(x):
    return 1 / (1 + math.exp(-x))


def test_bco_shift():
    """beta 0.5: rewards 2 and -1 on desirable, -3 on undesirable; delta = (0.5 - 3) / 2 = -1.25, not the mean -2/3."""
    ratio, desirable = tensor(4.0, -6.0, -2.0), torch.tensor([True, False, True])
    assert preference_losses.bco_shift(ratio, desirable, 0.5).item() == -1.25


def test_kto_by_hand_and_trl():
    """z0 = max(0, mean(1, -2, 4)) = 1. beta 0.5: desirable r = 3, margin 1; undesirable r = -3, margin -2. TRL has
    1 - sigmoid(beta (r - kl)) and 1 - sigmoid(beta (kl - r)): 1 - sigmoid(1) and 1 - sigmoid(2)."""
    baseline = preference_losses.kto_baseline(tensor(1.0, -2.0, 4.0))
    assert baseline.item() == 1.0
    assert preference_losses.kto_baseline(tensor(1.0, -2.0)).item() == 0.0
    got = preference_losses.kto(tensor(3.0, -3.0), torch.tensor([True, False]), baseline, 0.5, 1.5, 0.8)
    trl = tensor(1.5 * 0.2689414213699951, 0.8 * 0.11920292202211757)
    torch.testing.assert_close(got, trl, rtol=1e-12, atol=0)
    unpaired = preference_losses.kto(tensor(3.0, -3.0), torch.tensor([True, False]), tensor(0.0), 0.5)
    torch.testing.assert_close(unpaired, tensor(1 - sigma(1.5), sigma(-1.5)), rtol=1e-12, atol=0)


@given(st.integers(0, 10_000))
def test_kto_equals_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    ratio, mismatched = torch.randn(2, 8, dtype=torch.float64, generator=generator) * 5
    desirable = torch.rand(8, generator=generator) < 0.5
    z0 = max(0.0, sum(mismatched.tolist()) / 8)
    want = []
    for r, good in zip(ratio.tolist(), desirable.tolist(), strict=True):
        want.append(1.3 * (1 - sigma(0.2 * (r - z0))) if good else 0.7 * (1 - sigma(0.2 * (z0 - r))))
    baseline = preference_losses.kto_baseline(mismatched)
    got = preference_losses.kto(ratio, desirable, baseline, 0.2, 1.3, 0.7)
    torch.testing.assert_close(got, tensor(*want), rtol=1e-9, atol=1e-15)


def test_kto_gradient_and_its_constant_baseline():
    ratio, desirable = tensor(1.0, -2.0, 0.5).requires_grad_(), torch.tensor([True, False, False])
    mismatched = tensor(2.0, 1.0).requires_grad_()
    assert not preference_losses.kto_baseline(mismatched).requires_grad
    marked = tensor(0.5).requires_grad_()
    preference_losses.kto(ratio, desirable, marked, 0.3, 1.0, 2.0).sum().backward()
    assert marked.grad is None and (ratio.grad * (2 * ~desirable - 1) > 0).all()
    baseline = marked.detach()
    assert torch.autograd.gradcheck(lambda x: preference_losses.kto(x, desirable, baseline, 0.3, 1.0, 2.0), ratio)


def test_row_losses_at_the_extremes():
    desirable = torch.tensor([True, False, True, False])
    for compute in (
        lambda x: preference_losses.kto(x, desirable, tensor(0.0), 1.0),
        lambda x: preference_losses.aot_rows(x, desirable, torch.zeros_like(x), PairSettings(beta=1.0)),
    ):
        ratio = tensor(-1000.0, 1000.0, 1000.0, -1000.0).requires_grad_()
        loss = compute(ratio)
        loss.sum().backward()
        assert loss.isfinite().all() and ratio.grad.isfinite().all()
        assert (loss[:2] >= 1).all() and (loss[2:] == 0).all()


def test_a_baseline_of_no_rows_is_refused():
    with pytest.raises(AssertionError, match="mismatched"):
        preference_losses.kto_baseline(tensor())
