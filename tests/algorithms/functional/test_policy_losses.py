"""Token-level policy losses against literal numbers, loops over tokens and finite differences."""

import math

import pytest
import torch

from algorithms.functional import policy_losses


def tokens(seed=0, count=60):
    """Log-probs, old ones 0.8 apart at most, and advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(count, dtype=torch.float64, generator=generator)
    moved = 1.6 * torch.rand(count, dtype=torch.float64, generator=generator) - 0.8
    return old + moved, old, torch.randn(count, dtype=torch.float64, generator=generator)


def ppo_loop(lp, old, a, low, high, dual):
    rho = math.exp(lp - old)
    objective = min(rho * a, min(max(rho, 1 - low), 1 + high) * a)
    return -(max(objective, dual * a) if a < 0 else objective)


def sapo_loop(lp, old, a):
    tau = 1.0 if a > 0 else 1.05
    return -a * 4 / tau / (1 + math.exp(-tau * (math.exp(lp - old) - 1)))


LOSSES = {
    "ppo": (lambda *x: policy_losses.ppo(*x, 0.2, 0.28, 1.5)[0], lambda *x: ppo_loop(*x, 0.2, 0.28, 1.5)),
    "sapo": (policy_losses.sapo, sapo_loop),
    "reinforce": (lambda lp, old, a: policy_losses.reinforce(lp, a), lambda lp, old, a: -a * lp),
    "awr": (
        lambda lp, old, a: policy_losses.awr(lp, a, 0.5, 3.0)[0],
        lambda lp, old, a: -min(math.exp(a / 0.5), 3.0) * lp,
    ),
    "cispo": (
        lambda *x: policy_losses.cispo(*x, 0.2, 0.28)[0],
        lambda lp, old, a: -min(max(math.exp(lp - old), 0.8), 1.28) * a * lp,
    ),
    "truncated_cispo": (
        lambda *x: policy_losses.truncated_cispo(*x, 1.3)[0],
        lambda lp, old, a: -min(math.exp(lp - old), 1.3) * a * lp,
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_a_loop(name):
    ours, loop = LOSSES[name]
    got = ours(*tokens())
    want = [loop(*(float(x) for x in token)) for token in zip(*tokens(), strict=True)]
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["ppo", "sapo", "reinforce", "awr"])
def test_gradients_by_finite_differences(name):
    lp, old, a = tokens()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name][0](x, old, a).sum(), lp.requires_grad_())


@pytest.mark.parametrize("name", ["cispo", "truncated_cispo"])
def test_cispo_gradient_is_the_clipped_ratio_held_still(name):
    """-weight * A for each token: none loses its gradient, and none flows through the ratio."""
    lp, old, a = tokens()
    low, high = (0.8, 1.28) if name == "cispo" else (0.0, 1.3)
    leaf = lp.clone().requires_grad_()
    LOSSES[name][0](leaf, old, a).sum().backward()
    for i, gradient in enumerate(leaf.grad.tolist()):
        weight = min(max(math.exp(float(lp[i] - old[i])), low), high)
        assert gradient == pytest.approx(-weight * float(a[i]), rel=1e-12)


def test_ppo_by_hand():
    """Ratios 0.5, 1.5, 2.0, 6.0 with clip 0.2 / 0.28; the last two have a negative advantage, dual clip 3."""
    ratios, advantages = torch.tensor([0.5, 1.5, 2.0, 6.0]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss, active = policy_losses.ppo(ratios.log(), torch.zeros(4), advantages, 0.2, 0.28, dual_clip=3.0)
    torch.testing.assert_close(loss, torch.tensor([-0.5, -1.28, 2.0, 3.0]))
    assert active.tolist() == [False, True, False, False]


def test_dual_clip_bounds_the_loss_and_its_gradient():
    """A = -1, ratio 6: PPO's max gives 6, c = 3 holds it at 3, without gradient; A > 0 is left alone."""
    lp = torch.tensor([6.0, 6.0, 2.0]).double().log().requires_grad_()
    a = torch.tensor([-1.0, 1.0, -1.0]).double()
    loss, _ = policy_losses.ppo(lp, torch.zeros(3).double(), a, 0.2, 10.0, 3.0)
    torch.testing.assert_close(loss, torch.tensor([3.0, -6.0, 2.0]).double())
    loss.sum().backward()
    torch.testing.assert_close(lp.grad, torch.tensor([0.0, -6.0, 2.0]).double())


def test_sapo_by_hand():
    """At ratio 1 the value is -2 A / tau and the slope -A: the gate passes the policy gradient whole. At ratio
    1 + ln 3, sigmoid is 3/4 for tau = 1: -3, and the slope -4 (3/4)(1/4) rho."""
    lp = torch.tensor([0.0, 0.0, math.log(1 + math.log(3))], dtype=torch.float64, requires_grad=True)
    a = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    loss = policy_losses.sapo(lp, torch.zeros(3, dtype=torch.float64), a)
    torch.testing.assert_close(
        loss.detach(), torch.tensor([-2.0, 2 / 1.05, -3.0], dtype=torch.float64), rtol=1e-12, atol=0
    )
    loss.sum().backward()
    want = torch.tensor([-1.0, 1.0, -0.75 * (1 + math.log(3))], dtype=torch.float64)
    torch.testing.assert_close(lp.grad, want, rtol=1e-12, atol=0)


def test_sapo_treats_no_advantage_as_negative_and_takes_its_temperatures():
    a = torch.tensor([1.0, -1.0], dtype=torch.float64)
    loss = policy_losses.sapo(torch.zeros(2).double(), torch.zeros(2).double(), a, tau_positive=2.0, tau_negative=4.0)
    assert loss.tolist() == [-1.0, 0.5]


def test_cispo_by_hand():
    """Ratios 0.5, 1, 2 with bounds 0.8 and 1.28; log-probs -1, A = 2: weights 0.8, 1, 1.28."""
    lp, a = torch.full((3,), -1.0), torch.full((3,), 2.0)
    old = lp - torch.tensor([0.5, 1.0, 2.0]).log()
    loss, active = policy_losses.cispo(lp, old, a, 0.2, 0.28)
    torch.testing.assert_close(loss, torch.tensor([1.6, 2.0, 2.56]))
    assert active.tolist() == [True, False, True]
    loss, active = policy_losses.truncated_cispo(lp, old, a, 1.5)
    torch.testing.assert_close(loss, torch.tensor([1.0, 2.0, 3.0]))
    assert active.tolist() == [False, False, True]


def test_awr_by_hand():
    """A = beta ln 2, beta ln 50 with a cap of 20, log-prob -3: 6 and 60. The weight has no gradient."""
    a = (0.5 * torch.tensor([2.0, 50.0], dtype=torch.float64).log()).requires_grad_()
    lp = torch.full((2,), -3.0, dtype=torch.float64, requires_grad=True)
    loss, active = policy_losses.awr(lp, a, 0.5, 20.0)
    torch.testing.assert_close(loss, torch.tensor([6.0, 60.0], dtype=torch.float64), rtol=1e-12, atol=0)
    assert active.tolist() == [False, True]
    loss.sum().backward()
    torch.testing.assert_close(lp.grad, torch.tensor([-2.0, -20.0], dtype=torch.float64), rtol=1e-12, atol=0)
    assert a.grad is None


def test_awr_of_a_huge_advantage_is_the_cap():
    loss, _ = policy_losses.awr(torch.tensor([-1.0]), torch.tensor([1e6]), 0.05, 20.0)
    assert float(loss) == pytest.approx(20.0)


EXTREMES = (-1000.0, -89.0, -20.0, 0.0, 20.0, 89.0, 1000.0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_any_log_ratio_leaves_value_and_gradient_finite_in_float32(name, sign):
    """exp overflows at 88.7, and inf x 0 in its gradient would be NaN: from 20 on, the ratio stays where it is."""
    lp = torch.tensor(EXTREMES, requires_grad=True)
    loss = LOSSES[name][0](lp, torch.zeros(len(EXTREMES)), torch.full((len(EXTREMES),), sign))
    loss.sum().backward()
    assert loss.isfinite().all() and lp.grad.isfinite().all()
    if name in ("ppo", "sapo"):
        assert lp.grad[[0, 1, 5, 6]].tolist() == [0.0] * 4
