"""The exact KL over a small vocabulary, and every estimator's value and gradient against it."""

import math

import pytest
import torch

from algorithms.functional import kl


def distributions(seed=0, rows=2, width=3, vocabulary=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, width, vocabulary, dtype=torch.float64, generator=generator)


def loop_kl(p, q):
    """sum_v p log(p / q) for lists of probabilities; 0 log 0 = 0."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_full_vocabulary_equals_a_loop(direction):
    logits, ref = distributions()
    got = kl.full_vocabulary(direction, logits.log_softmax(-1), ref.log_softmax(-1))
    for b in range(2):
        for t in range(3):
            pair = logits[b, t].softmax(-1).tolist(), ref[b, t].softmax(-1).tolist()
            want = loop_kl(*(pair if direction == "reverse" else pair[::-1]))
            assert float(got[b, t]) == pytest.approx(want, rel=1e-10)


def test_full_vocabulary_by_hand():
    """p = (1/2, 1/2), q = (1/4, 3/4): KL(p || q) = 0.5 ln(4/3), KL(q || p) = 0.75 ln 3 - ln 2."""
    p, q = torch.tensor([0.5, 0.5]).double().log(), torch.tensor([0.25, 0.75]).double().log()
    assert float(kl.full_vocabulary("reverse", p, q)) == pytest.approx(0.5 * math.log(4 / 3), rel=1e-12)
    assert float(kl.full_vocabulary("forward", p, q)) == pytest.approx(0.75 * math.log(3) - math.log(2), rel=1e-12)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_full_vocabulary_gradient_by_finite_differences(direction):
    logits, ref = distributions()

    def total(x):
        return kl.full_vocabulary(direction, x.log_softmax(-1), ref.log_softmax(-1)).sum()

    assert torch.autograd.gradcheck(total, logits.requires_grad_())


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_a_token_that_neither_can_sample_adds_nothing(direction):
    """A banned token has log-prob -inf on both sides: 0 * (-inf + inf) must be 0, in value and gradient."""
    logits, ref = distributions()
    wide = [torch.cat([x, torch.full((2, 3, 1), float("-inf"), dtype=torch.float64)], -1) for x in (logits, ref)]
    leaf = wide[0].clone().requires_grad_()
    got = kl.full_vocabulary(direction, leaf.log_softmax(-1), wide[1].log_softmax(-1))
    torch.testing.assert_close(got, kl.full_vocabulary(direction, logits.log_softmax(-1), ref.log_softmax(-1)))
    got.sum().backward()
    assert leaf.grad.isfinite().all()


def test_a_token_that_only_the_policy_can_sample_is_infinitely_far():
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    assert kl.full_vocabulary("reverse", p, q) == float("inf")
    assert float(kl.full_vocabulary("forward", p, q)) == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("kind", "want"),
    [("k1", 0.7), ("k2", 0.245), ("k3", math.exp(-0.7) - 1 + 0.7), ("absolute", 0.7)],
)
def test_estimators_by_hand(kind, want):
    lp, ref = torch.tensor([-0.5], dtype=torch.float64), torch.tensor([-1.2], dtype=torch.float64)
    assert float(kl.estimate(kind, lp, ref)) == pytest.approx(want, rel=1e-12)
    flipped = float(kl.estimate(kind, ref, lp))
    assert flipped == pytest.approx({"k1": -0.7, "k3": math.exp(0.7) - 1 - 0.7}.get(kind, want), rel=1e-12)


def expected(kind, logits, ref):
    """E over all tokens of the estimator: its value, and its own gradient with the samples fixed, as a loss has it."""
    leaf = logits.clone().requires_grad_()
    lp = leaf.log_softmax(-1)
    value = (lp.detach().exp() * kl.estimate(kind, lp, ref.log_softmax(-1))).sum()
    value.backward()
    return value.detach(), leaf.grad


def exact(direction, logits, ref):
    leaf = logits.clone().requires_grad_()
    value = kl.full_vocabulary(direction, leaf.log_softmax(-1), ref.log_softmax(-1)).sum()
    value.backward()
    return value.detach(), leaf.grad


@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradients_against_the_enumerated_vocabulary(seed):
    """k1 and k3 are unbiased in value, k2 is not. As a loss, k2's gradient is KL(policy || reference)'s, k3's is
    KL(reference || policy)'s, and k1's is 0 whatever the reference."""
    logits, ref = distributions(seed)
    value, gradient = exact("reverse", logits, ref)
    for kind in ("k1", "k3"):
        torch.testing.assert_close(expected(kind, logits, ref)[0], value, rtol=1e-9, atol=0)
    assert abs(expected("k2", logits, ref)[0] - value) > 1e-3
    torch.testing.assert_close(expected("k2", logits, ref)[1], gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(expected("k3", logits, ref)[1], exact("forward", logits, ref)[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(expected("k1", logits, ref)[1], torch.zeros_like(logits), rtol=0, atol=1e-12)
    assert gradient.abs().max() > 0.1


def test_k1_as_a_reward_gives_the_exact_gradient():
    """REINFORCE with reward -k1, enumerated: sum_v p (-k1) grad log p = -grad KL."""
    logits, ref = distributions()
    leaf = logits.clone().requires_grad_()
    lp = leaf.log_softmax(-1)
    reward = -kl.estimate("k1", lp.detach(), ref.log_softmax(-1))
    (lp.detach().exp() * reward * lp).sum().backward()
    torch.testing.assert_close(leaf.grad, -exact("reverse", logits, ref)[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "absolute"])
def test_estimator_gradients_by_finite_differences(kind):
    lp, ref = distributions()

    def total(x):
        return kl.estimate(kind, x, ref).sum()

    assert torch.autograd.gradcheck(total, lp.requires_grad_())


def test_a_fixed_coefficient_stays():
    assert kl.FixedKL().next(0.3, 1e9, 512) == 0.3


def test_adaptive_controller():
    controller = kl.AdaptiveKL(target=6.0, horizon=10_000)
    assert controller.next(0.2, 6.6, 512) == pytest.approx(0.2 * (1 + 0.1 * 512 / 10_000))
    assert controller.next(0.2, 60.0, 512) == pytest.approx(0.2 * (1 + 0.2 * 512 / 10_000))
    assert controller.next(0.2, 0.0, 512) == pytest.approx(0.2 * (1 - 0.2 * 512 / 10_000))


def test_k3_stays_finite_where_the_reference_is_far_above():
    lp = torch.tensor([-100.0, -1000.0], requires_grad=True)
    value = kl.estimate("k3", lp, torch.zeros(2))
    value.sum().backward()
    assert value.isfinite().all() and lp.grad.isfinite().all()
