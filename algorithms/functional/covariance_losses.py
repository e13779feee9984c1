"""Clip-Cov and KL-Cov (2505.22617, section 4): tokens of high covariance between log-prob and advantage, which drive
the entropy down, are left out of the loss, or held by a KL penalty.

Both are coupled over the batch: means, counts and quantiles are of all trainable tokens of the optimizer step. So they
come in three parts: `covariance` of each token given the step's means, a *selection* given the step's constants, and a
loss given the selection. No part reads its own micro-batch's statistics, so any split selects the same tokens.

Our reading: the covariance uses the log-probs of before the update (`old_logprobs`), with which the means and the
selection are known before the first optimizer step; at that step they equal the paper's current log-probs. The
authors' code takes the means of each micro-batch instead, and leaves tokens that PPO's clip already holds out of the
choice; at ratio 1 there are none.
"""

import torch
from torch import Tensor

from algorithms.functional import kl
from algorithms.functional.masked import zeroed
from algorithms.functional.policy_losses import ppo
from algorithms.functional.ratios import ratio


def covariance(
    logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, mean_logprob: float, mean_advantage: float
) -> Tensor:
    """(logprobs - mean logprob) (A - mean A) of each trainable token (2505.22617, section 4), without gradient,
    0 elsewhere. The means are over all trainable tokens of the step."""
    logprobs_BT, advantages_BT = logprobs_BT.detach(), advantages_BT.detach()
    (covariance_BT,) = zeroed(mask_BT, (logprobs_BT - mean_logprob) * (advantages_BT - mean_advantage))
    return covariance_BT


def _signed(bits: int) -> int:
    """The int64 with these 64 bits."""
    return (bits + (1 << 63)) % (1 << 64) - (1 << 63)


def _shifted(x: Tensor, places: int) -> Tensor:
    """x >> places with zeros moved in, where int64 would move in the sign."""
    return (x >> places) & ((1 << (64 - places)) - 1)


def _mixed(x: Tensor) -> Tensor:
    """One step of SplitMix64 (Steele et al. 2014) on int64, whose products wrap: a bijection, every output bit
    depending on every input bit."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def token_uniforms(seed: int, row_B: Tensor, width: int) -> Tensor:
    """(B, T = width) float64 in [0, 1): a function of (seed, row id, position) alone, so every split, order and
    padding on the right draws the same number for a token. row_B: int64 ids, unique over the step."""
    seeds_B = _mixed(_mixed(torch.full_like(row_B, _signed(seed))) ^ row_B)
    bits_BT = _mixed(seeds_B[:, None] ^ torch.arange(width, device=row_B.device))
    return _shifted(bits_BT, 11).double() * 2.0**-53


def eligible(covariance_BT: Tensor, mask_BT: Tensor, lower: float, upper: float) -> Tensor:
    """(B, T) bool: lower < covariance < upper, the tokens Clip-Cov chooses among (1 and 5 in the paper's code)."""
    return mask_BT & (covariance_BT > lower) & (covariance_BT < upper)


def clip_cov_selection(
    eligible_BT: Tensor, uniforms_BT: Tensor, num_eligible: int, num_tokens: int, share: float
) -> Tensor:
    """(B, T) bool: eligible tokens whose uniform number is below k / num_eligible, k = max(1, floor(share *
    num_tokens)). The counts are of the whole step.

    Our reading: each eligible token is drawn on its own with that chance, so k is the expected count; the paper
    draws exactly k at random, which no rank can do on its own rows.
    """
    chance = max(1, int(share * num_tokens)) / max(num_eligible, 1)
    return eligible_BT & (uniforms_BT < chance)


def largest_share(covariances: Tensor, share: float) -> float:
    """The smallest of the max(1, floor(share * N)) largest of N covariances (flat, of the whole step): KL-Cov's
    threshold (2505.22617, section 4). +inf where there is none, which selects nothing."""
    if not covariances.numel():
        return float("inf")
    return float(covariances.flatten().topk(max(1, int(share * covariances.numel()))).values[-1])


def kl_cov_selection(covariance_BT: Tensor, mask_BT: Tensor, threshold: float) -> Tensor:
    """(B, T) bool: trainable tokens whose covariance is at or above the step's threshold (see `largest_share`)."""
    return mask_BT & (covariance_BT >= threshold)


def clip_cov(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    selected_BT: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """PPO's loss, 0 and without gradient at selected tokens (2505.22617, Clip-Cov; with PPO's clip, as in the
    authors' code; the paper's equation has none, which clip_low = 1 and a large clip_high give).
    Returns the loss and the tokens held back, by the selection or by PPO's clip."""
    loss_BT, active_BT = ppo(logprobs_BT, old_logprobs_BT, advantages_BT, clip_low, clip_high, mask=mask_BT)
    selected_BT = selected_BT & mask_BT
    return loss_BT.where(~selected_BT, 0), active_BT | selected_BT


def kl_cov(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    selected_BT: Tensor,
    coef: float = 1.0,
    estimator: kl.Estimator = "absolute",
) -> tuple[Tensor, Tensor]:
    """-A rho, plus coef * KL(old || policy) at selected tokens (2505.22617, KL-Cov). Returns the loss and the tokens
    under the penalty.

    estimator: of that KL from the sampled token, x = old - logprobs: |x| in the authors' code, the default; the paper
    names none.
    """
    logprobs_BT, old_logprobs_BT, advantages_BT = zeroed(mask_BT, logprobs_BT, old_logprobs_BT, advantages_BT)
    selected_BT = selected_BT & mask_BT
    penalty_BT = kl.estimate(estimator, old_logprobs_BT, logprobs_BT, selected_BT)
    return -advantages_BT * ratio(logprobs_BT - old_logprobs_BT) + coef * penalty_BT, selected_BT
