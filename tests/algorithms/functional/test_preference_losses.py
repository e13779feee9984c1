"""Preference losses against TRL's numbers, scalar float64 loops, finite differences, and splits of a step."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithms.functional import preference_losses
from algorithms.functional.preference_losses import PAIR_LOSSES, Pairs, PairSettings

SETTINGS = PairSettings(beta=0.25, label_smoothing=0.1, discopop_temperature=0.05, simpo_margin=0.7, nll_coef=0.5)
FIELDS = ("chosen_P", "rejected_P", "ref_chosen_P", "ref_rejected_P", "chosen_nll_P")


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_pairs(seed, num_pairs=6):
    """Log-probs of -4 +- 2, all below 0 (ORPO's are log-probabilities)."""
    generator = torch.Generator().manual_seed(seed)
    return Pairs(*-(torch.randn(5, num_pairs, dtype=torch.float64, generator=generator) * 2 + 4).abs())


def select(pairs, index):
    return Pairs(*(getattr(pairs, field)[index] for field in FIELDS))


def swapped(pairs):
    return Pairs(pairs.rejected_P, pairs.chosen_P, pairs.ref_rejected_P, pairs.ref_chosen_P, pairs.chosen_nll_P)


def evaluate(name, pairs, settings=SETTINGS):
    """The loss of all pairs of a step, its constants computed from these pairs."""
    entry = PAIR_LOSSES[name]
    constants = entry.constants(pairs, settings) if entry.constants else ()
    return entry.loss(pairs, settings, *constants)


# TRL 1.16's own source lines, run in float64 on four pairs: (label smoothing, per-pair losses). The responses' lengths
# are 4, 10, 5, 8 and 5, 8, 2, 16. "aot" and "aot_unpaired" are in sorted order there.
CHOSEN, REJECTED = tensor(-12.0, -30.5, -8.25, -20.0), tensor(-15.5, -22.0, -8.0, -41.0)
REF_CHOSEN, REF_REJECTED = tensor(-14.0, -29.0, -9.5, -18.0), tensor(-13.0, -25.0, -6.0, -30.0)
LENGTHS, REJECTED_LENGTHS = tensor(4.0, 10.0, 5.0, 8.0), tensor(5.0, 8.0, 2.0, 16.0)
TRL = {
    "sigmoid": (0.0, [0.2811501362483148, 1.4061501362483149, 0.367242032138927, 0.10020655891674721]),
    "sigmoid_norm": (0.0, [0.5759394198788436, 0.7609239570490257, 0.5490548622706681, 0.6399542971134814]),
    "hinge": (0.0, [0.0, 2.125, 0.1875, 0.0]),
    "ipo": (0.0, [1.0, 6.375624999999999, 0.5625, 2.44140625]),
    "exo_pair": (0.1, [0.08699655402681047, 1.2072075025805953, 0.16372468351355035, 0.00012184843026327025]),
    "nca_pair": (0.0, [1.1754658154084194, 1.72812039926721, 1.2168707854960554, 1.2420992707717595]),
    "robust": (0.1, [0.14052513624831475, 1.546775136248315, 0.265679532138927, -0.1810434410832528]),
    "bco_pair": (0.0, [0.9027776624566253, 2.03499427025474, 1.0231318464507748, 1.0360445731833052]),
    "sppo_hard": (0.0, [0.25, 37.25, 0.5625, 97.0]),
    "apo_zero": (0.0, [0.7261858041320912, 1.2718452991294626, 0.8000453036123336, 0.6825459813758622]),
    "apo_down": (0.0, [0.8675443443342263, 1.1622483869135585, 0.8848533820510757, 0.47289013369725486]),
    "discopop": (0.0, [0.32465246735098957, 1.40615013653155, 0.44374730337596796, 0.10539922456186433]),
    "cpo": (0.1, [0.43594458100505573, 2.025322278771569, 0.7186353823577756, 0.5302337981517431]),
}
TRL_AOT = [1.2936501362483148, 0.44849203213892697, 0.3936501362483148, 0.3252065589167472]
TRL_AOT_UNPAIRED = [0.3252065589167472, 0.6009394198788436, 0.44849203213892697, 0.8009394198788435]


def trl_pairs(per_token):
    chosen, rejected = (LENGTHS, REJECTED_LENGTHS) if per_token else (torch.ones(4), torch.ones(4))
    nothing = torch.zeros_like(CHOSEN)
    return Pairs(CHOSEN / chosen, REJECTED / rejected, REF_CHOSEN / chosen, REF_REJECTED / rejected, nothing)


@pytest.mark.parametrize("name", TRL)
def test_equals_trl(name):
    label_smoothing, want = TRL[name]
    settings = replace(SETTINGS, label_smoothing=label_smoothing)
    got = evaluate(name, trl_pairs(PAIR_LOSSES[name].per_token), settings)
    torch.testing.assert_close(got, tensor(*want), rtol=1e-9, atol=0)


def test_simpo_and_orpo_equal_trl():
    """TRL's ORPO casts to float32 and gives lambda log sigma, without the sign and the NLL."""
    settings = PairSettings(beta=2.0, label_smoothing=0.1, simpo_margin=0.5)
    want = tensor(0.8243552444685271, 1.2773353251154305, 0.4348842546719182, 0.8606232641398401)
    torch.testing.assert_close(evaluate("simpo", trl_pairs(True), settings), want, rtol=1e-9, atol=0)
    want = tensor(0.16050930321216583, 0.2161179482936859, 0.01889074221253395, 0.1649429351091385)
    torch.testing.assert_close(evaluate("orpo", trl_pairs(True)), want, rtol=2e-6, atol=0)


def test_aot_equals_trl():
    """TRL's row i is the i-th smallest policy margin; ours is the pair that has it."""
    order = (CHOSEN - REJECTED).argsort()
    torch.testing.assert_close(evaluate("aot", trl_pairs(False))[order], tensor(*TRL_AOT), rtol=1e-9, atol=0)
    total = evaluate("aot_unpaired", trl_pairs(False)).sum()
    torch.testing.assert_close(total, tensor(*TRL_AOT_UNPAIRED).sum(), rtol=1e-9, atol=0)


def sigma(x):
    return 1 / (1 + math.exp(-x))


def log_odds(x):
    return math.log(math.exp(x) / (1 - math.exp(x)))


def smoothed(x, e):
    return -(1 - e) * math.log(sigma(x)) - e * math.log(sigma(-x))


def by_formula(name, w, ll, ref_w, ref_l, nll, s, mean_reward):
    """One pair, straight from the papers, without a thought for stability."""
    r_w, r_l, e, b = w - ref_w, ll - ref_l, s.label_smoothing, s.beta
    x = b * (r_w - r_l)
    m = sigma(x / s.discopop_temperature)
    return {
        "sigmoid": lambda: smoothed(x, e),
        "sigmoid_norm": lambda: smoothed(x, e),
        "robust": lambda: (-(1 - e) * math.log(sigma(x)) + e * math.log(sigma(-x))) / (1 - 2 * e),
        "ipo": lambda: (r_w - r_l - 1 / (2 * b)) ** 2,
        "hinge": lambda: max(0.0, 1 - x),
        "exo_pair": lambda: sigma(x) * math.log(sigma(x) / (1 - e)) + sigma(-x) * math.log(sigma(-x) / e),
        "nca_pair": lambda: -math.log(sigma(b * r_w)) - 0.5 * math.log(sigma(-b * r_w) * sigma(-b * r_l)),
        "apo_zero": lambda: 1 - sigma(b * r_w) + sigma(b * r_l),
        "apo_down": lambda: sigma(b * r_w) + 1 - sigma(x),
        "bco": lambda: -math.log(sigma(b * r_w - mean_reward)) - math.log(sigma(-(b * r_l - mean_reward))),
        "bco_pair": lambda: -math.log(sigma(b * r_w)) - math.log(sigma(-b * r_l)),
        "sppo_hard": lambda: (r_w - 0.5 / b) ** 2 + (r_l + 0.5 / b) ** 2,
        "discopop": lambda: (1 - m) * -math.log(sigma(x)) + m * math.exp(-x),
        "simpo": lambda: smoothed(b * (w - ll) - s.simpo_margin, e),
        "cpo": lambda: smoothed(b * (w - ll), e) + s.nll_coef * nll,
        "orpo": lambda: s.nll_coef * nll - b * math.log(sigma(log_odds(w) - log_odds(ll))),
    }[name]()


ONE_BY_ONE = [name for name in PAIR_LOSSES if name not in ("aot", "aot_unpaired")]


@pytest.mark.parametrize("name", ONE_BY_ONE)
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_formula_one_pair_at_a_time(name, seed):
    pairs = random_pairs(seed)
    columns = [getattr(pairs, field).tolist() for field in FIELDS]
    rewards = [SETTINGS.beta * (columns[side][p] - columns[side + 2][p]) for side in (0, 1) for p in range(6)]
    want = [by_formula(name, *row, SETTINGS, sum(rewards) / 12) for row in zip(*columns, strict=True)]
    torch.testing.assert_close(evaluate(name, pairs), tensor(*want), rtol=1e-9, atol=1e-15)


def test_by_hand():
    """r_w = 3, r_l = -1, beta 0.5: D = 4, beta D = 2; with log 9 / 4 as beta, beta D = log 9 and sigma = 0.9."""
    pairs = Pairs(tensor(-2.0), tensor(-6.0), tensor(-5.0), tensor(-5.0), tensor(2.0))
    half = PairSettings(beta=0.5, label_smoothing=0.0)
    assert evaluate("ipo", pairs, half).tolist() == [9.0]
    assert evaluate("hinge", pairs, half).tolist() == [0.0]
    assert evaluate("hinge", pairs, PairSettings(beta=0.125)).tolist() == [0.5]
    assert evaluate("sppo_hard", pairs, half).tolist() == [4.0]
    nine = PairSettings(beta=math.log(9) / 4, label_smoothing=0.25)
    log_right, log_wrong = math.log(0.9), math.log(0.1)
    assert evaluate("sigmoid", pairs, nine).item() == pytest.approx(-0.75 * log_right - 0.25 * log_wrong, rel=1e-12)
    assert evaluate("robust", pairs, nine).item() == pytest.approx(-1.5 * log_right + 0.5 * log_wrong, rel=1e-12)
    assert evaluate("exo_pair", pairs, nine).item() == pytest.approx(0.9 * math.log(1.2) + 0.1 * math.log(0.4))
    assert abs(evaluate("exo_pair", pairs, replace(nine, label_smoothing=0.1)).item()) < 1e-15


@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if name != "aot_unpaired"])
def test_gradient_by_finite_differences(name):
    """With constants held. `aot_unpaired` is tested on whole steps: a row's gradient is not its value's derivative."""
    pairs, entry = random_pairs(7), PAIR_LOSSES[name]
    constants = entry.constants(pairs, SETTINGS) if entry.constants else ()

    def loss(chosen, rejected, nll):
        moved = replace(pairs, chosen_P=chosen, rejected_P=rejected, chosen_nll_P=nll)
        return entry.loss(moved, SETTINGS, *constants)

    leaves = [column.clone().requires_grad_() for column in (pairs.chosen_P, pairs.rejected_P, pairs.chosen_nll_P)]
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_extremes_are_finite_and_keep_their_dtype(name, dtype):
    """Log-ratios of +-1000 and 0, on either side; beta 1. ORPO's inputs are log-probabilities, the last one 0."""
    levels = [-1000.0, -1.0, -1e-6, 0.0] if name == "orpo" else [-1000.0, 0.0, 1000.0]
    grid = torch.tensor([(w, other) for w in levels for other in levels], dtype=dtype)
    chosen, rejected = (column.clone().requires_grad_() for column in grid.T)
    zeros = torch.zeros(len(grid), dtype=dtype)
    loss = evaluate(name, Pairs(chosen, rejected, zeros, zeros, zeros), replace(SETTINGS, beta=1.0))
    assert loss.dtype == dtype and loss.isfinite().all()
    loss.sum().backward()
    assert chosen.grad.isfinite().all() and rejected.grad.isfinite().all()
    assert chosen.grad.any() and rejected.grad.any()


def test_far_out_the_loss_is_a_line():
    chosen = tensor(-1000.0).requires_grad_()
    zero = tensor(0.0)
    plain = PairSettings(beta=1.0)
    for name in ("sigmoid", "bco_pair", "discopop", "simpo"):
        chosen.grad = None
        loss = evaluate(name, Pairs(chosen, zero, zero, zero, zero), plain)
        loss.backward()
        extra = {"bco_pair": math.log(2), "simpo": 0.5}.get(name, 0.0)
        assert loss.item() == pytest.approx(1000 + extra, rel=1e-12) and chosen.grad.item() == pytest.approx(-1.0)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_the_right_order_costs_less(name):
    """r_w = 2 and r_l = -2 against the labels swapped."""
    right = Pairs(tensor(-2.0), tensor(-6.0), tensor(-4.0), tensor(-4.0), tensor(1.0))
    assert evaluate(name, right).sum() < evaluate(name, swapped(right)).sum()


@given(st.integers(0, 10_000), st.floats(0.01, 0.49))
def test_swapping_the_labels(seed, flipped):
    """What a swap does, exactly: a smoothed label is a swap of e; robust DPO is unbiased under flips of e; the
    quadratic losses differ by a line."""
    pairs, settings = random_pairs(seed), replace(SETTINGS, label_smoothing=flipped)
    plain = replace(settings, label_smoothing=0.0)
    clean, wrong = evaluate("sigmoid", pairs, plain), evaluate("sigmoid", swapped(pairs), plain)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(evaluate("sigmoid", pairs, settings), (1 - flipped) * clean + flipped * wrong, **close)
    robust, flipped_robust = evaluate("robust", pairs, settings), evaluate("robust", swapped(pairs), settings)
    torch.testing.assert_close((1 - flipped) * robust + flipped * flipped_robust, clean, **close)
    torch.testing.assert_close(wrong - clean, settings.beta * pairs.differences, **close)
    for name in ("ipo", "sppo_hard"):
        swap = evaluate(name, swapped(pairs), settings) - evaluate(name, pairs, settings)
        torch.testing.assert_close(swap, 2 * pairs.differences / settings.beta, **close)


def test_log1mexp_at_both_ends():
    """log(1 - exp(x)); log(-x) + x / 2 + O(x^2) near 0 and -exp(x) far away."""
    x = tensor(-1e-300, -1e-10, -math.log(2), -1.0, -40.0, -1000.0).requires_grad_()
    want = tensor(math.log(1e-300), math.log(1e-10) - 0.5e-10, -math.log(2), -0.45867514538708193, -math.exp(-40), 0.0)
    got = preference_losses.log1mexp(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    got.sum().backward()
    slopes = [-math.exp(v) / -math.expm1(v) for v in x.tolist()]
    torch.testing.assert_close(x.grad, tensor(*slopes), rtol=1e-12, atol=0)


# Batch-coupled losses


def whole_aot(pairs, settings):
    """Sum over sorted pairs, as TRL and the paper have it, with autograd through the sort."""
    policy, reference = pairs.chosen_P - pairs.rejected_P, pairs.ref_chosen_P - pairs.ref_rejected_P
    return logistic_sum(policy.sort().values - reference.sort().values, settings)


def whole_aot_unpaired(pairs, settings):
    chosen, rejected = pairs.chosen_P - pairs.ref_chosen_P, pairs.rejected_P - pairs.ref_rejected_P
    return logistic_sum(chosen.sort().values - rejected.sort().values, settings)


def logistic_sum(delta, settings):
    x, e = settings.beta * delta, settings.label_smoothing
    return ((1 - e) * torch.log1p(torch.exp(-x)) + e * torch.log1p(torch.exp(x))).sum()


def value_and_gradient(compute, pairs):
    """`compute` maps pairs with gradient to a list of partial sums; each is back-propagated on its own."""
    chosen, rejected = (column.clone().requires_grad_() for column in (pairs.chosen_P, pairs.rejected_P))
    parts = compute(replace(pairs, chosen_P=chosen, rejected_P=rejected))
    for part in parts:
        part.backward()
    return sum(part.detach() for part in parts), chosen.grad, rejected.grad


def in_parts(name, constants, parts):
    def compute(pairs):
        return [
            PAIR_LOSSES[name].loss(select(pairs, part), SETTINGS, *(c[part] for c in constants)).sum()
            for part in parts
            if len(part)
        ]

    return compute


@given(st.integers(0, 10_000), st.lists(st.integers(0, 3), min_size=9, max_size=9))
@pytest.mark.parametrize(("name", "whole"), [("aot", whole_aot), ("aot_unpaired", whole_aot_unpaired)])
def test_aot_over_any_split_is_the_whole_sorted_loss(name, whole, seed, owner):
    pairs = random_pairs(seed, 9)
    constants = PAIR_LOSSES[name].constants(pairs, SETTINGS)
    parts = [torch.tensor([p for p in range(9) if owner[p] == rank], dtype=torch.int64) for rank in range(4)]
    got = value_and_gradient(in_parts(name, constants, parts), pairs)
    want = value_and_gradient(lambda moved: [whole(moved, SETTINGS)], pairs)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_unpaired_aot_by_finite_differences_of_the_whole_step():
    """The gradient summed over two ranks against central differences of the sorted loss, not against its autograd."""
    pairs = random_pairs(3, 5)
    constants = PAIR_LOSSES["aot_unpaired"].constants(pairs, SETTINGS)
    parts = [torch.tensor([0, 3]), torch.tensor([1, 2, 4])]
    _, chosen_grad, rejected_grad = value_and_gradient(in_parts("aot_unpaired", constants, parts), pairs)
    for field, grad in (("chosen_P", chosen_grad), ("rejected_P", rejected_grad)):
        for p in range(5):
            step = torch.zeros(5, dtype=torch.float64)
            step[p] = 1e-6
            high, low = (replace(pairs, **{field: getattr(pairs, field) + sign * step}) for sign in (1, -1))
            slope = (whole_aot_unpaired(high, SETTINGS) - whole_aot_unpaired(low, SETTINGS)) / 2e-6
            assert grad[p].item() == pytest.approx(slope.item(), rel=1e-6)


def test_rank_partners_by_hand():
    """Ranks of 5, 1, 3 are 2, 0, 1; ties keep their order, so that partners of partners are the same rows."""
    assert preference_losses.rank_partners(tensor(5, 1, 3), tensor(30, 10, 20)).tolist() == [30, 10, 20]
    assert preference_losses.rank_partners(tensor(5, 1, 3), tensor(10, 20, 30)).tolist() == [30, 10, 20]
    assert preference_losses.rank_partners(tensor(7, 7, 1), tensor(2, 3, 1)).tolist() == [2, 3, 1]


def test_aot_with_ties_and_one_pair():
    tied = Pairs(tensor(-1, -1, -2), tensor(-2, -2, -2), tensor(-1, -2, -3), tensor(-3, -3, -3), tensor(0, 0, 0))
    for name, whole in (("aot", whole_aot), ("aot_unpaired", whole_aot_unpaired)):
        assert evaluate(name, tied).sum().item() == pytest.approx(whole(tied, SETTINGS).item(), rel=1e-12)
        alone = select(random_pairs(5), torch.tensor([2]))
        assert evaluate(name, alone).item() == pytest.approx(evaluate("sigmoid", alone).item(), rel=1e-12)


def test_unpaired_aot_rows_are_the_sides_of_its_pairs():
    """Chosen and rejected responses as eight separate rows, in any order."""
    pairs = random_pairs(11, 4)
    chosen, rejected = pairs.ratios
    partners = torch.cat(PAIR_LOSSES["aot_unpaired"].constants(pairs, SETTINGS))
    order = torch.tensor([3, 6, 0, 1, 7, 2, 5, 4])
    rows = preference_losses.aot_rows(torch.cat([chosen, rejected])[order], order < 4, partners[order], SETTINGS)
    assert rows.sum().item() == pytest.approx(evaluate("aot_unpaired", pairs).sum().item(), rel=1e-12)


def test_constants_carry_no_gradient():
    """Neither when computed, nor when a caller passes one that has a gradient."""
    pairs = random_pairs(2)
    leaves = replace(pairs, chosen_P=pairs.chosen_P.clone().requires_grad_())
    for name in ("aot", "aot_unpaired", "bco"):
        constants = PAIR_LOSSES[name].constants(leaves, SETTINGS)
        assert not any(constant.requires_grad for constant in constants)
        marked = [constant.clone().requires_grad_() for constant in constants]
        PAIR_LOSSES[name].loss(leaves, SETTINGS, *marked).sum().backward()
        assert all(constant.grad is None for constant in marked)


# The registry


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_loss_reads_what_its_entry_names_and_nothing_else(name):
    pairs, entry = random_pairs(1), PAIR_LOSSES[name]
    base = evaluate(name, pairs)
    for field, value in vars(PairSettings(0.31, 0.2, 0.5, 0.9, 0.25)).items():
        changed = not torch.equal(evaluate(name, pairs, replace(SETTINGS, **{field: value})), base)
        assert changed == (field in entry.settings), field
    bare = replace(
        pairs,
        ref_chosen_P=pairs.ref_chosen_P if entry.reference else None,
        ref_rejected_P=pairs.ref_rejected_P if entry.reference else None,
        chosen_nll_P=pairs.chosen_nll_P if entry.nll else None,
    )
    assert torch.equal(evaluate(name, bare), base)
    if entry.reference:
        with pytest.raises(AssertionError, match="reference"):
            evaluate(name, replace(pairs, ref_chosen_P=None))
    if entry.nll:
        with pytest.raises(AssertionError, match="chosen_nll_P"):
            evaluate(name, replace(pairs, chosen_nll_P=None))


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_pair_depends_on_others_only_through_its_constants(name):
    """Any two pairs of a step, alone on a rank, give what they give in the step."""
    pairs, entry, index = random_pairs(9), PAIR_LOSSES[name], torch.tensor([4, 1])
    constants = entry.constants(pairs, SETTINGS) if entry.constants else ()
    alone = entry.loss(select(pairs, index), SETTINGS, *(constant[index] for constant in constants))
    torch.testing.assert_close(alone, evaluate(name, pairs)[index], rtol=1e-14, atol=0)
    if entry.constants is None:
        torch.testing.assert_close(evaluate(name, select(pairs, index)), alone, rtol=1e-14, atol=0)


def test_settings_out_of_range_are_refused():
    pairs = random_pairs(0)
    for name, change in (
        ("exo_pair", {"label_smoothing": 0.0}),
        ("robust", {"label_smoothing": 0.5}),
        ("discopop", {"discopop_temperature": 0.0}),
        ("discopop", {"discopop_temperature": 1.5}),
    ):
        with pytest.raises(AssertionError):
            evaluate(name, pairs, replace(SETTINGS, **change))
    with pytest.raises(AssertionError, match="equal numbers"):
        preference_losses.rank_partners(tensor(1, 2), tensor(1))
