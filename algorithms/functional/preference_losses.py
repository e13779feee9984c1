"""Preference losses: pure functions of sequence log-probs, one loss a pair (P) or a judged row (B), before aggregation.

Notation: w chosen, l rejected; r = logprob - ref_logprob of a whole response (log-ratio), D = r_w - r_l. Log-probs are
sums over the response's tokens; the losses of `PAIR_LOSSES` with `per_token` take means over its tokens instead.

A batch-coupled loss (BCO's shift, AOT's matching, KTO's baseline) takes what it needs of the other rows as a constant
without gradient, computed once over all rows of the optimizer step: then any split of the step gives the same gradient.

The second source is TRL 1.16 (`DPOTrainer`, `CPOTrainer`, `ORPOTrainer`, `KTOTrainer`). Where it differs, the docstring
says so. All values and gradients are finite for log-ratios of +-1000 (logsigmoid, never the log of a sigmoid).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Pairs:
    """What the policy and the reference say of P pairs; every tensor is (P,).

    chosen_P, rejected_P: the policy's log-probs, with gradient. ref_chosen_P, ref_rejected_P: the reference's; None for
    losses without a reference. chosen_nll_P: negative log-likelihood of the chosen response, with gradient; only for
    losses with `nll`, in whatever normalisation the caller wants (CPO's paper sums it over tokens, TRL averages it).
    """

    chosen_P: Tensor
    rejected_P: Tensor
    ref_chosen_P: Tensor | None = None
    ref_rejected_P: Tensor | None = None
    chosen_nll_P: Tensor | None = None

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """r_w and r_l, each (P,)."""
        assert self.ref_chosen_P is not None and self.ref_rejected_P is not None, "this loss needs a reference"
        return self.chosen_P - self.ref_chosen_P, self.rejected_P - self.ref_rejected_P

    @property
    def differences(self) -> Tensor:
        """D = r_w - r_l, (P,)."""
        chosen_P, rejected_P = self.ratios
        return chosen_P - rejected_P


@dataclass(frozen=True)
class PairSettings:
    """Knobs of all pair losses; `PairLoss.settings` names those that a loss reads.

    label_smoothing: probability that a label is flipped, in [0, 0.5); `exo_pair` needs more than 0 (its paper: 1e-3).
    discopop_temperature: in (0, 1]. simpo_margin: gamma of SimPO (its paper: 0.5 to 1.6 with beta 2.0 to 2.5).
    nll_coef: weight of `chosen_nll_P` where the loss has that term.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_temperature: float = 0.05
    simpo_margin: float = 0.5
    nll_coef: float = 1.0


def _logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigma(x) - e log sigma(-x), any shape."""
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def sigmoid(pairs: Pairs, settings: PairSettings) -> Tensor:
    """-(1 - e) log sigma(beta D) - e log sigma(-beta D): DPO (2305.18290, eq. 7) for label smoothing e = 0, else
    conservative DPO (E. Mitchell's note on noisy preferences, 2023). TRL 1.16 ignores e here. With length means
    (`sigmoid_norm`) it is length-normalised DPO (Tulu 3, 2411.15124)."""
    return _logistic(settings.beta * pairs.differences, settings.label_smoothing)


def robust(pairs: Pairs, settings: PairSettings) -> Tensor:
    """[-(1 - e) log sigma(beta D) + e log sigma(-beta D)] / (1 - 2 e): unbiased for DPO's loss when a share e of the
    labels is flipped (robust DPO, 2403.00409). Not bounded below."""
    assert settings.label_smoothing < 0.5, "robust DPO needs label_smoothing below 0.5"
    margin_P, flipped = settings.beta * pairs.differences, settings.label_smoothing
    return (-(1 - flipped) * logsigmoid(margin_P) + flipped * logsigmoid(-margin_P)) / (1 - 2 * flipped)


def ipo(pairs: Pairs, settings: PairSettings) -> Tensor:
    """(D - 1 / (2 beta))^2, D of length means (IPO, 2310.12036, eq. 17; beta is its tau). The paper does not print the
    division by length; its authors confirmed it (TRL does the same)."""
    return (pairs.differences - 1 / (2 * settings.beta)) ** 2


def hinge(pairs: Pairs, settings: PairSettings) -> Tensor:
    """max(0, 1 - beta D): SLiC-HF's calibration loss (2305.10425) on DPO's reward (RSO, 2309.06657)."""
    return (1 - settings.beta * pairs.differences).relu()


def exo_pair(pairs: Pairs, settings: PairSettings) -> Tensor:
    """KL(p || q), p = (sigma(beta D), sigma(-beta D)), q = (1 - e, e): EXO with two responses (2402.00856, eq. 16), the
    reverse of DPO's direction of KL. e = label_smoothing > 0."""
    assert settings.label_smoothing > 0, "exo_pair needs label_smoothing above 0: its target has no zeros"
    margin_P, flipped = settings.beta * pairs.differences, settings.label_smoothing
    right_P = margin_P.sigmoid() * (logsigmoid(margin_P) - math.log1p(-flipped))
    wrong_P = (-margin_P).sigmoid() * (logsigmoid(-margin_P) - math.log(flipped))
    return right_P + wrong_P


def nca_pair(pairs: Pairs, settings: PairSettings) -> Tensor:
    """-log sigma(beta r_w) - 0.5 log sigma(-beta r_w) - 0.5 log sigma(-beta r_l): noise-contrastive alignment with two
    responses (2402.05369)."""
    chosen_P, rejected_P = (settings.beta * ratio_P for ratio_P in pairs.ratios)
    return -logsigmoid(chosen_P) - 0.5 * logsigmoid(-chosen_P) - 0.5 * logsigmoid(-rejected_P)


def apo_zero(pairs: Pairs, settings: PairSettings) -> Tensor:
    """1 - sigma(beta r_w) + sigma(beta r_l) (2408.06266, eq. 7): for chosen responses better than the policy's own.
    The constant 1, as in TRL, keeps it above 0."""
    chosen_P, rejected_P = pairs.ratios
    return (-settings.beta * chosen_P).sigmoid() + (settings.beta * rejected_P).sigmoid()


def apo_down(pairs: Pairs, settings: PairSettings) -> Tensor:
    """sigma(beta r_w) + 1 - sigma(beta D) (2408.06266, eq. 8): for chosen responses worse than the policy's own. The
    constant 1, as in TRL, keeps it above 0."""
    chosen_P, _ = pairs.ratios
    return (settings.beta * chosen_P).sigmoid() + (-settings.beta * pairs.differences).sigmoid()


def sppo_hard(pairs: Pairs, settings: PairSettings) -> Tensor:
    """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2: SPPO (2405.00675, eq. 4.7) at eta = 1 / beta, win rates 1, 0.
    The paper's reference is the policy of the previous iteration, and its win rates are estimated."""
    chosen_P, rejected_P = pairs.ratios
    return (chosen_P - 0.5 / settings.beta) ** 2 + (rejected_P + 0.5 / settings.beta) ** 2


def discopop(pairs: Pairs, settings: PairSettings) -> Tensor:
    """(1 - m) (-log sigma(x)) + m exp(-x), x = beta D, m = sigma(x / tau) (DiscoPOP, 2406.08414, eq. 5; tau 0.05).

    m exp(-x) is exp(log m - x): bounded for tau <= 1, where TRL's product is 0 x inf for x below -710 (float32: -88).
    """
    assert 0 < settings.discopop_temperature <= 1, "above a temperature of 1 the exponential has no bound"
    margin_P = settings.beta * pairs.differences
    scaled_P = margin_P / settings.discopop_temperature
    return -(-scaled_P).sigmoid() * logsigmoid(margin_P) + torch.exp(logsigmoid(scaled_P) - margin_P)


def simpo(pairs: Pairs, settings: PairSettings) -> Tensor:
    """-log sigma(beta (lp_w - lp_l) - gamma), lp of length means, no reference (SimPO, 2405.14734, eq. 6); label
    smoothing, not in the paper, as in TRL."""
    margin_P = settings.beta * (pairs.chosen_P - pairs.rejected_P) - settings.simpo_margin
    return _logistic(margin_P, settings.label_smoothing)


def cpo(pairs: Pairs, settings: PairSettings) -> Tensor:
    """-log sigma(beta (lp_w - lp_l)) + nll_coef * NLL_w, no reference (CPO, 2401.08417: nll_coef 1, the NLL a sum over
    tokens; TRL takes their mean and calls nll_coef cpo_alpha). Label smoothing as in TRL."""
    assert pairs.chosen_nll_P is not None, "cpo needs chosen_nll_P"
    preference_P = _logistic(settings.beta * (pairs.chosen_P - pairs.rejected_P), settings.label_smoothing)
    return preference_P + settings.nll_coef * pairs.chosen_nll_P


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, any shape, accurate at both ends (M. Maechler, 2012), in value and gradient."""
    near = x > -math.log(2)
    near_zero = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    return torch.where(near, near_zero, torch.log1p(-torch.exp(torch.where(near, -1.0, x))))


def orpo(pairs: Pairs, settings: PairSettings) -> Tensor:
    """nll_coef * NLL_w - beta log sigma(log odds_w - log odds_l), log odds = lp - log(1 - exp(lp)), lp the length mean
    (ORPO, 2403.07691, eqs. 6 and 7; beta is its lambda, nll_coef 1).

    A probability of 1 has infinite odds: lp is held at -eps of its dtype, without gradient there (TRL: NaN). TRL takes
    the NLL over prompt and response, the paper over the response; ours is the caller's `chosen_nll_P`.
    """
    assert pairs.chosen_nll_P is not None, "orpo needs chosen_nll_P"
    highest = -torch.finfo(pairs.chosen_P.dtype).eps
    chosen_P, rejected_P = pairs.chosen_P.clamp(max=highest), pairs.rejected_P.clamp(max=highest)
    log_odds_P = (chosen_P - log1mexp(chosen_P)) - (rejected_P - log1mexp(rejected_P))
    return settings.nll_coef * pairs.chosen_nll_P - settings.beta * logsigmoid(log_odds_P)


@torch.no_grad()
def bco_shift(logratio_B: Tensor, desirable_B: Tensor, beta: float) -> Tensor:
    """delta = (mean reward of desirable + mean reward of undesirable rows) / 2, reward = beta r, over all rows of the
    optimizer step (scalar, no gradient). Both kinds must be there."""
    rewards_B = beta * logratio_B
    return 0.5 * (rewards_B[desirable_B].mean() + rewards_B[~desirable_B].mean())


def bco(pairs: Pairs, settings: PairSettings, shift: Tensor) -> Tensor:
    """-log sigma(beta r_w - delta) - log sigma(delta - beta r_l): BCO (2404.04656) on both halves of a pair; `shift` is
    delta, a scalar or (P,). TRL 1.16's DPOTrainer has no delta: that is `bco_pair`."""
    chosen_P, rejected_P = pairs.ratios
    shift = shift.detach()
    return -logsigmoid(settings.beta * chosen_P - shift) - logsigmoid(shift - settings.beta * rejected_P)


def bco_pair(pairs: Pairs, settings: PairSettings) -> Tensor:
    """`bco` with delta = 0 (TRL 1.16's bco_pair)."""
    return bco(pairs, settings, pairs.chosen_P.new_zeros(()))


@torch.no_grad()
def rank_partners(values_N: Tensor, others_N: Tensor) -> Tensor:
    """For each value the one of `others` with the same rank: one-dimensional optimal transport between equal numbers
    of samples (AOT, 2406.05882). Over all rows of the optimizer step, without gradient. Stable among ties."""
    assert values_N.shape == others_N.shape, "AOT matches equal numbers of samples"
    partners_N = torch.empty_like(others_N)
    partners_N[values_N.argsort(stable=True)] = others_N.sort().values
    return partners_N


def aot(pairs: Pairs, settings: PairSettings, ref_partner_P: Tensor) -> Tensor:
    """Logistic loss (as `sigmoid`) of beta (u_(i) - v_(i)), u and v the sorted margins lp_w - lp_l of policy and
    reference (AOT on pairs, 2406.05882). `ref_partner_P` is the reference margin with the rank of the row's own margin:
    only the policy has a gradient, so a row's value and gradient are those of its own term of the whole-step sum."""
    margin_P = pairs.chosen_P - pairs.rejected_P
    return _logistic(settings.beta * (margin_P - ref_partner_P.detach()), settings.label_smoothing)


def aot_rows(logratio_B: Tensor, chosen_B: Tensor, partner_B: Tensor, settings: PairSettings) -> Tensor:
    """One side of unpaired AOT: logistic loss f of beta (r - partner) on chosen rows, of beta (partner - r) on rejected
    ones, as f - 0.5 stop_gradient(f).

    The whole-step loss has one f for each (chosen, rejected) match, with a gradient into both. Here each of the two
    rows carries all of its own gradient and half of the value: sums over rows give the whole loss and its gradient
    whatever the split. A row's gradient is therefore twice the derivative of its value, on purpose.
    """
    margin_B = torch.where(chosen_B, logratio_B - partner_B.detach(), partner_B.detach() - logratio_B)
    loss_B = _logistic(settings.beta * margin_B, settings.label_smoothing)
    return loss_B - 0.5 * loss_B.detach()


def aot_unpaired(pairs: Pairs, settings: PairSettings, rejected_partner_P: Tensor, chosen_partner_P: Tensor) -> Tensor:
    """Logistic loss of beta (u_(i) - v_(i)), u and v the sorted log-ratios of chosen and of rejected responses (AOT on
    unpaired samples, 2406.05882). `rejected_partner_P` is the v matched with the row's r_w, `chosen_partner_P` the u
    matched with its r_l. See `aot_rows` for value and gradient."""
    chosen_P, rejected_P = pairs.ratios
    is_chosen_P = torch.ones_like(chosen_P, dtype=torch.bool)
    return aot_rows(chosen_P, is_chosen_P, rejected_partner_P, settings) + aot_rows(
        rejected_P, ~is_chosen_P, chosen_partner_P, settings
    )


def _bco_constants(pairs: Pairs, settings: PairSettings) -> tuple[Tensor, ...]:
    logratio_B = torch.cat(pairs.ratios)
    desirable_B = torch.arange(len(logratio_B), device=logratio_B.device) < len(pairs.chosen_P)
    return (bco_shift(logratio_B, desirable_B, settings.beta).expand_as(pairs.chosen_P),)


def _aot_constants(pairs: Pairs, settings: PairSettings) -> tuple[Tensor, ...]:
    assert pairs.ref_chosen_P is not None and pairs.ref_rejected_P is not None, "aot needs a reference"
    return (rank_partners(pairs.chosen_P - pairs.rejected_P, pairs.ref_chosen_P - pairs.ref_rejected_P),)


def _aot_unpaired_constants(pairs: Pairs, settings: PairSettings) -> tuple[Tensor, ...]:
    chosen_P, rejected_P = pairs.ratios
    return rank_partners(chosen_P, rejected_P), rank_partners(rejected_P, chosen_P)


@dataclass(frozen=True)
class PairLoss:
    """A pair loss by name: `loss(pairs, settings, *constants)` gives (P,).

    settings: the fields of `PairSettings` it reads. per_token: log-probs are means over the response's tokens, not
    sums. reference: it reads the reference's log-probs. nll: it reads `chosen_nll_P`. constants: of a batch-coupled
    loss, what it needs of all pairs of the optimizer step, each (P,) in their order, so that a rank takes its own rows.
    """

    loss: Callable[..., Tensor]
    settings: tuple[str, ...] = ("beta",)
    per_token: bool = False
    reference: bool = True
    nll: bool = False
    constants: Callable[[Pairs, PairSettings], tuple[Tensor, ...]] | None = None


_SMOOTHED = ("beta", "label_smoothing")

PAIR_LOSSES: Mapping[str, PairLoss] = MappingProxyType(
    {
        "sigmoid": PairLoss(sigmoid, _SMOOTHED),
        "sigmoid_norm": PairLoss(sigmoid, _SMOOTHED, per_token=True),
        "robust": PairLoss(robust, _SMOOTHED),
        "ipo": PairLoss(ipo, per_token=True),
        "hinge": PairLoss(hinge),
        "exo_pair": PairLoss(exo_pair, _SMOOTHED),
        "nca_pair": PairLoss(nca_pair),
        "aot": PairLoss(aot, _SMOOTHED, constants=_aot_constants),
        "aot_unpaired": PairLoss(aot_unpaired, _SMOOTHED, constants=_aot_unpaired_constants),
        "apo_zero": PairLoss(apo_zero),
        "apo_down": PairLoss(apo_down),
        "bco": PairLoss(bco, constants=_bco_constants),
        "bco_pair": PairLoss(bco_pair),
        "sppo_hard": PairLoss(sppo_hard),
        "discopop": PairLoss(discopop, ("beta", "discopop_temperature")),
        "simpo": PairLoss(simpo, (*_SMOOTHED, "simpo_margin"), per_token=True, reference=False),
        "cpo": PairLoss(cpo, (*_SMOOTHED, "nll_coef"), reference=False, nll=True),
        "orpo": PairLoss(orpo, ("beta", "nll_coef"), per_token=True, reference=False, nll=True),
    }
)


@torch.no_grad()
def kto_baseline(mismatched_logratio_N: Tensor) -> Tensor:
    """z0 = max(0, mean of lp - ref over mismatched prompt-response pairs), a scalar without gradient (KTO, 2402.01306:
    prompt i with the response to prompt i + 1). Over all N rows of the optimizer step, N > 0."""
    assert len(mismatched_logratio_N), "KTO's baseline needs at least one mismatched pair"
    return mismatched_logratio_N.mean().clamp(min=0)


def kto(
    logratio_B: Tensor,
    desirable_B: Tensor,
    baseline: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """lambda_D (1 - sigma(beta (r - z0))) on desirable rows, lambda_U (1 - sigma(beta (z0 - r))) on undesirable ones
    (KTO, 2402.01306). `desirable_B` is bool; `baseline` is z0 of `kto_baseline`, a scalar or (B,) without gradient, and
    0 gives TRL's apo_zero_unpaired (2408.06266, eq. 7 without pairs)."""
    margin_B = beta * (logratio_B - baseline.detach())
    desirable_loss_B = desirable_weight * (-margin_B).sigmoid()
    return torch.where(desirable_B, desirable_loss_B, undesirable_weight * margin_B.sigmoid())
