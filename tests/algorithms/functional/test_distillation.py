"""Divergences against literal numbers, scalar loops, TRL's numbers and finite differences; junk; enumeration."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithms.functional import distillation

NEVER = float("-inf")
DIVERGENCES = {
    "forward": distillation.forward_kl,
    "reverse": distillation.reverse_kl,
    "jsd 0.1": lambda s, t, m: distillation.generalised_jsd(s, t, m, 0.1),
    "jsd 0.5": lambda s, t, m: distillation.generalised_jsd(s, t, m, 0.5),
    "jsd 0.9": lambda s, t, m: distillation.generalised_jsd(s, t, m, 0.9),
}
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_case(seed, rows=2, width=4, vocabulary=5, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, rows, width, vocabulary, dtype=torch.float64, generator=generator) * scale
    mask = torch.rand(rows, width, generator=generator) < 0.6
    mask[0, 0], mask[-1, -1] = True, False
    student, teacher = logits.log_softmax(-1)
    return student, teacher, mask


def loop(p, q):
    return sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True) if a > NEVER)


def loop_jsd(student, teacher, beta):
    mixture = [
        math.log(beta * math.exp(t) + (1 - beta) * math.exp(s)) if max(s, t) > NEVER else NEVER
        for s, t in zip(student, teacher, strict=True)
    ]
    return beta * loop(teacher, mixture) + (1 - beta) * loop(student, mixture)


def test_by_hand():
    """Student (1/2, 1/2), teacher (3/4, 1/4); their middle is (5/8, 3/8)."""
    student, teacher = tensor(0.5, 0.5).log().reshape(1, 1, 2), tensor(0.75, 0.25).log().reshape(1, 1, 2)
    mask = torch.ones(1, 1, dtype=torch.bool)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    middle = 0.5 * (0.75 * math.log(1.2) + 0.25 * math.log(2 / 3)) + 0.5 * (0.5 * math.log(0.8) + 0.5 * math.log(4 / 3))
    assert distillation.forward_kl(student, teacher, mask).item() == pytest.approx(forward, rel=1e-12)
    assert distillation.reverse_kl(student, teacher, mask).item() == pytest.approx(reverse, rel=1e-12)
    assert distillation.generalised_jsd(student, teacher, mask, 0.5).item() == pytest.approx(middle, rel=1e-12)


@pytest.mark.parametrize(
    ("beta", "want"),
    [
        (0.0, [1.140962561643844, 0.57528140598737]),
        (0.1, [0.09998796014721817, 0.05096838779010868]),
        (0.5, [0.27604036183074787, 0.1398089026185448]),
        (0.9, [0.11509585381632363, 0.053672927087660846]),
        (1.0, [1.3963280022143452, 0.6165244262729681]),
    ],
)
def test_jsd_equals_trl(beta, want):
    """GKDTrainer.generalized_jsd_loss of TRL 1.16, reduction "none", summed over the vocabulary."""
    student = tensor(0.5, -1.0, 2.0, 0.0, 1.0, -0.5).reshape(1, 2, 3).log_softmax(-1)
    teacher = tensor(1.0, 0.0, -1.0, 2.0, 0.5, 0.25).reshape(1, 2, 3).log_softmax(-1)
    got = distillation.generalised_jsd(student, teacher, torch.ones(1, 2, dtype=torch.bool), beta)
    torch.testing.assert_close(got, tensor(*want).reshape(1, 2), rtol=1e-9, atol=0)


@given(st.integers(0, 10_000), st.floats(0.01, 0.99))
def test_equals_a_loop_over_tokens(seed, beta):
    student, teacher, mask = random_case(seed)
    want = torch.zeros(3, *mask.shape, dtype=torch.float64)
    for b, t in mask.nonzero().tolist():
        s, q = student[b, t].tolist(), teacher[b, t].tolist()
        want[:, b, t] = tensor(loop(q, s), loop(s, q), loop_jsd(s, q, beta))
    close = {"rtol": 1e-9, "atol": 1e-14}
    torch.testing.assert_close(distillation.forward_kl(student, teacher, mask), want[0], **close)
    torch.testing.assert_close(distillation.reverse_kl(student, teacher, mask), want[1], **close)
    torch.testing.assert_close(distillation.generalised_jsd(student, teacher, mask, beta), want[2], **close)


@given(st.integers(0, 10_000))
def test_limits_and_symmetries_of_the_jsd(seed):
    """JSD / beta -> forward KL, JSD / (1 - beta) -> reverse KL; swapping the models swaps beta; 0 for equal models."""
    student, teacher, mask = random_case(seed, scale=0.7)
    forward, reverse = distillation.forward_kl(student, teacher, mask), distillation.reverse_kl(student, teacher, mask)
    low = distillation.generalised_jsd(student, teacher, mask, 1e-7) / 1e-7
    high = distillation.generalised_jsd(student, teacher, mask, 1 - 1e-7) / 1e-7
    torch.testing.assert_close(low, forward, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(high, reverse, rtol=1e-4, atol=1e-6)
    assert torch.equal(distillation.generalised_jsd(student, teacher, mask, 0.0), forward)
    assert torch.equal(distillation.generalised_jsd(student, teacher, mask, 1.0), reverse)
    swapped = distillation.generalised_jsd(teacher, student, mask, 0.7)
    torch.testing.assert_close(distillation.generalised_jsd(student, teacher, mask, 0.3), swapped)
    for divergence in DIVERGENCES.values():
        assert divergence(student, student, mask).abs().max() < 1e-14
        assert (divergence(student, teacher, mask)[mask] > 0).all()


@every_divergence
def test_gradient_by_finite_differences(divergence):
    """Through the log-softmax, as a model would have it; and of the log-probs themselves."""
    student, teacher, mask = random_case(3)
    logits = student.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: divergence(x.log_softmax(-1), teacher, mask), logits)
    assert torch.autograd.gradcheck(lambda x: divergence(x, teacher, mask), logits)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), NEVER, 1e30])
@every_divergence
def test_junk_at_masked_slots_changes_nothing(divergence, junk):
    student, teacher, mask = random_case(4)
    clean, dirty = student.clone().requires_grad_(), student.where(mask[..., None], junk).requires_grad_()
    want, got = divergence(clean, teacher, mask), divergence(dirty, teacher.where(mask[..., None], junk), mask)
    assert torch.equal(got, want) and not got[~mask].any()
    want.sum().backward()
    got.sum().backward()
    assert torch.equal(dirty.grad, clean.grad) and clean.grad[mask].all() and not clean.grad[~mask].any()


@every_divergence
def test_tokens_that_a_model_rules_out(divergence):
    """Token 3 is ruled out by both: the same numbers as without it, gradients included."""
    student, teacher, mask = random_case(5, vocabulary=3)
    wide_teacher = torch.cat([teacher, torch.full_like(teacher[..., :1], NEVER)], -1)
    narrow, wide = (student.clone().requires_grad_() for _ in range(2))
    ruled_out = torch.cat([wide, torch.full_like(wide[..., :1], NEVER)], -1).log_softmax(-1)
    want, got = divergence(narrow.log_softmax(-1), teacher, mask), divergence(ruled_out, wide_teacher, mask)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)
    want.sum().backward()
    got.sum().backward()
    torch.testing.assert_close(wide.grad, narrow.grad, rtol=1e-9, atol=1e-15)


def test_tokens_that_one_model_rules_out():
    """A zero of p costs nothing, a zero of q where p has mass is infinite (JSD: finite, at most log 2)."""
    half, sure = tensor(0.5, 0.5).log().reshape(1, 1, 2), tensor(0.0, NEVER).reshape(1, 1, 2)
    mask = torch.ones(1, 1, dtype=torch.bool)
    assert distillation.forward_kl(half, sure, mask).item() == pytest.approx(math.log(2), rel=1e-12)
    assert distillation.reverse_kl(sure, half, mask).item() == pytest.approx(math.log(2), rel=1e-12)
    assert distillation.forward_kl(sure, half, mask).item() == math.inf
    assert distillation.reverse_kl(half, sure, mask).item() == math.inf
    for student, teacher in ((half, sure), (sure, half)):
        leaf = student.clone().requires_grad_()
        loss = distillation.generalised_jsd(leaf, teacher, mask, 0.25)
        loss.sum().backward()
        want = loop_jsd(student.flatten().tolist(), teacher.flatten().tolist(), 0.25)
        assert loss.item() == pytest.approx(want, rel=1e-12) and leaf.grad.isfinite().all()


@every_divergence
def test_extremes_are_finite(divergence):
    """Logits 1000 apart, either way round; in float32 and float64; the dtype is kept."""
    for dtype in (torch.float32, torch.float64):
        logits = torch.tensor([[[1000.0, 0.0, -1000.0], [-1000.0, 0.0, 1000.0]]], dtype=dtype).requires_grad_()
        teacher = logits.detach().flip(-1).log_softmax(-1)
        loss = divergence(logits.log_softmax(-1), teacher, torch.ones(1, 2, dtype=torch.bool))
        loss.sum().backward()
        assert loss.isfinite().all() and (loss > 0).all() and logits.grad.isfinite().all() and loss.dtype == dtype


def test_mass_too_small_for_a_float_against_a_ruled_out_token():
    """exp(-1000) is 0: with q = -inf the term is 0, not 0 x inf."""
    tiny, ruled_out = tensor(0.0, -1000.0).reshape(1, 1, 2), tensor(0.0, NEVER).reshape(1, 1, 2)
    assert distillation.reverse_kl(tiny, ruled_out, torch.ones(1, 1, dtype=torch.bool)).item() == 0.0


@every_divergence
def test_nothing_to_train(divergence):
    student, teacher, mask = random_case(6)
    leaf = student.clone().requires_grad_()
    loss = divergence(leaf, teacher, mask & False)
    loss.sum().backward()
    assert not loss.any() and not leaf.grad.any()


def test_beta_outside_the_unit_interval_is_refused():
    for beta in (-0.1, 1.1):
        with pytest.raises(AssertionError, match="mixture"):
            distillation.generalised_jsd(*random_case(0), beta)


def test_sampled_advantages_by_hand_without_gradient_and_junk():
    student, teacher = tensor(-1.0, -2.0, float("nan")).reshape(1, 3), tensor(-3.0, -0.5, NEVER).reshape(1, 3)
    mask = torch.tensor([[True, True, False]])
    got = distillation.sampled_reverse_kl_advantages(student.requires_grad_(), teacher, mask)
    assert got.tolist() == [[-2.0, 1.5, 0.0]] and not got.requires_grad


def test_sampled_advantages_give_the_exact_reverse_kl_on_policy():
    """Expectation over the vocabulary: of -A the value, of the gradient of -A log p_S the gradient."""
    torch.manual_seed(1)
    logits, teacher_logits = torch.randn(2, 6, dtype=torch.float64)
    teacher, everything = teacher_logits.log_softmax(-1), torch.ones(6, 1, dtype=torch.bool)
    leaf = logits.clone().requires_grad_()
    student = leaf.log_softmax(-1)
    sampled = distillation.sampled_reverse_kl_advantages(student[:, None], teacher[:, None], everything)[:, 0]
    (student.detach().exp() * -sampled * student).sum().backward()
    exact = logits.clone().requires_grad_()
    one = torch.ones(1, 1, dtype=torch.bool)
    value = distillation.reverse_kl(exact.log_softmax(-1)[None, None], teacher[None, None], one).sum()
    value.backward()
    assert (student.exp() * -sampled).sum().item() == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(leaf.grad, exact.grad, rtol=1e-9, atol=1e-12)


def test_a_vocabulary_padded_further_counts_for_the_tokens_that_both_have():
    """The teacher's fifth token stands for no text: its distribution is that of the first four, summing to 1."""
    student, teacher, mask = random_case(3)
    cut_student, cut_teacher = distillation.over_common_tokens(student[..., :4].log_softmax(-1), teacher)
    for b, t in mask.nonzero().tolist():
        p = [math.exp(value) for value in teacher[b, t, :4].tolist()]
        want = [math.log(value / sum(p)) for value in p]
        torch.testing.assert_close(cut_teacher[b, t], tensor(*want), rtol=1e-12, atol=0)
    assert torch.equal(cut_student, student[..., :4].log_softmax(-1))
    again = distillation.over_common_tokens(teacher, student[..., :4].log_softmax(-1))
    assert torch.equal(again[0], cut_teacher) and torch.equal(again[1], cut_student)
    assert distillation.over_common_tokens(student, teacher)[0] is student


def test_a_listed_token_that_the_student_lacks_is_named():
    student, _, _ = random_case(4)
    with pytest.raises(ValueError, match="the teacher lists token 5, the student has 5 tokens"):
        distillation.listed_and_others(student, torch.tensor([[[1, 5]] * 4] * 2))
