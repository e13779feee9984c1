"""Corrections for samples drawn by another policy than the one about to be updated: stale weights, or an inference
engine whose numbers differ from the trainer's.

k = exp(old - rollout), without gradient: *token*, one k a token; *sequence*, the product over a row's trainable tokens
on each of them; *geometric*, its L-th root. A correction multiplies the loss and leaves the weights of the step as
they are; `reject` drops rows, which changes the mask before the weights are computed. |log k| is held at 20 (k up to
4.9e8), so that sums stay finite.
"""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from algorithms.functional import kl, policy_losses
from algorithms.functional.masked import row_max, row_mean, spread, zeroed
from algorithms.functional.ratios import ratio

Level = Literal["token", "sequence", "geometric"]


@dataclass(frozen=True)
class RatioStatistics:
    """What a correction did, as sums over tokens (level token) or over rows with a trainable token (other levels):
    `merged` gives that of several micro-batches and ranks.

    count, cut: all of them, and those beyond a bound. ratio_*: of k before the correction. factor_*: of what the loss
    is multiplied by.
    """

    count: float = 0.0
    cut: float = 0.0
    ratio_sum: float = 0.0
    ratio_max: float = 0.0
    factor_sum: float = 0.0
    factor_sum_sq: float = 0.0

    def merged(self, other: "RatioStatistics") -> "RatioStatistics":
        return RatioStatistics(
            count=self.count + other.count,
            cut=self.cut + other.cut,
            ratio_sum=self.ratio_sum + other.ratio_sum,
            ratio_max=max(self.ratio_max, other.ratio_max),
            factor_sum=self.factor_sum + other.factor_sum,
            factor_sum_sq=self.factor_sum_sq + other.factor_sum_sq,
        )

    @property
    def mean(self) -> float:
        return self.ratio_sum / max(self.count, 1.0)

    @property
    def cut_share(self) -> float:
        return self.cut / max(self.count, 1.0)

    @property
    def effective_sample_size(self) -> float:
        """(sum f)^2 / sum f^2 of the factors f: how many equal samples these are worth, `count` at most."""
        return self.factor_sum**2 / self.factor_sum_sq if self.factor_sum_sq else 0.0


def ratios(old_logprobs_BT: Tensor, rollout_logprobs_BT: Tensor, mask_BT: Tensor, level: Level = "token") -> Tensor:
    """(B, T): k at the level asked for, without gradient, 0 at masked slots."""
    log_ratio_BT = old_logprobs_BT.detach() - rollout_logprobs_BT.detach()
    if level != "token":
        mean_B = row_mean(log_ratio_BT, mask_BT)
        log_ratio_BT = spread(mean_B * mask_BT.sum(1) if level == "sequence" else mean_B, mask_BT)
    (ratio_BT,) = zeroed(mask_BT, ratio(log_ratio_BT))
    return ratio_BT


def _statistics(k: Tensor, factor: Tensor, cut: Tensor) -> RatioStatistics:
    k, factor = k.double(), factor.double()
    return RatioStatistics(
        count=float(k.numel()),
        cut=float(cut.sum()),
        ratio_sum=float(k.sum()),
        ratio_max=float(k.max()) if k.numel() else 0.0,
        factor_sum=float(factor.sum()),
        factor_sum_sq=float((factor * factor).sum()),
    )


def _counted(mask_BT: Tensor, level: Level) -> Tensor:
    """(B, T) bool: the slots that statistics are taken over: every trainable token, or the first one of each row."""
    return mask_BT if level == "token" else mask_BT & (mask_BT.cumsum(1) == 1)


def tis(
    old_logprobs_BT: Tensor,
    rollout_logprobs_BT: Tensor,
    mask_BT: Tensor,
    cap: float = 2.0,
    level: Level = "token",
) -> tuple[Tensor, RatioStatistics]:
    """min(k, cap), 0 at masked slots: truncated importance sampling (Ionides 2008; for engines that differ, Yao et al.
    2025, "Your efficient RL framework secretly brings you off-policy RL training")."""
    ratio_BT, at_BT = ratios(old_logprobs_BT, rollout_logprobs_BT, mask_BT, level), _counted(mask_BT, level)
    factor_BT = ratio_BT.clamp(max=cap)
    return factor_BT, _statistics(ratio_BT[at_BT], factor_BT[at_BT], ratio_BT[at_BT] > cap)


def icepop(
    old_logprobs_BT: Tensor,
    rollout_logprobs_BT: Tensor,
    mask_BT: Tensor,
    low: float = 0.5,
    high: float = 5.0,
    level: Level = "token",
) -> tuple[Tensor, RatioStatistics]:
    """k where low <= k <= high, else 0; 0 at masked slots (IcePop, 2510.18855)."""
    ratio_BT, at_BT = ratios(old_logprobs_BT, rollout_logprobs_BT, mask_BT, level), _counted(mask_BT, level)
    inside_BT = (ratio_BT >= low) & (ratio_BT <= high)
    factor_BT = ratio_BT.where(inside_BT, 0)
    return factor_BT, _statistics(ratio_BT[at_BT], factor_BT[at_BT], ~inside_BT[at_BT])


def mis(
    old_logprobs_BT: Tensor,
    rollout_logprobs_BT: Tensor,
    mask_BT: Tensor,
    cap: float = 2.0,
    level: Level = "token",
) -> tuple[Tensor, RatioStatistics]:
    """k where k <= cap, else 0; 0 at masked slots: masked importance sampling (Liu et al. 2025, "When speed kills
    stability"). The rows stay in the step's denominators."""
    return icepop(old_logprobs_BT, rollout_logprobs_BT, mask_BT, 0.0, cap, level)


def decoupled_ppo(
    logprobs_BT: Tensor,
    proximal_logprobs_BT: Tensor,
    rollout_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    cap: float = math.inf,
) -> tuple[Tensor, Tensor, RatioStatistics]:
    """k max(-A u, -A clip(u, 1 - clip_low, 1 + clip_high)), k = proximal / rollout without gradient, u = policy /
    proximal (decoupled PPO, 2110.00641; AReaL, 2505.24298). A token with k > cap is left out, as AReaL's code
    does. Returns the loss, where the clipped branch was the active one, and the statistics of k."""
    factor_BT, statistics = mis(proximal_logprobs_BT, rollout_logprobs_BT, mask_BT, cap)
    loss_BT, active_BT = policy_losses.ppo(
        logprobs_BT, proximal_logprobs_BT, advantages_BT, clip_low, clip_high, dual_clip, mask_BT
    )
    return factor_BT * loss_BT, active_BT, statistics


def reject(
    old_logprobs_BT: Tensor,
    rollout_logprobs_BT: Tensor,
    mask_BT: Tensor,
    bound: float,
    estimator: Literal["k1", "k2", "k3"] = "k3",
    over: Literal["mean", "max"] = "mean",
) -> tuple[Tensor, RatioStatistics]:
    """(B,) bool, the rows to keep: |estimator of KL(rollout || old)|, mean or maximum over a row's trainable tokens,
    is at most `bound`.

    x = rollout - old: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x. k1 has a sign, and its absolute value counts: a
    policy that moved far up is as stale as one that moved far down; of the mean, so the geometric mean of k lies in
    exp(+-bound). A row without trainable tokens is kept. The statistics are over rows, with k their geometric mean.
    """
    divergence_BT = kl.estimate(estimator, rollout_logprobs_BT.detach(), old_logprobs_BT.detach(), mask_BT)
    per_row_B = row_mean(divergence_BT, mask_BT).abs() if over == "mean" else row_max(divergence_BT.abs(), mask_BT)
    keep_B = per_row_B <= bound
    ratio_BT = ratios(old_logprobs_BT, rollout_logprobs_BT, mask_BT, "geometric")
    at_BT = _counted(mask_BT, "geometric")
    alive_B = mask_BT.any(1)
    return keep_B, _statistics(ratio_BT[at_BT], keep_B[alive_B], ~keep_B[alive_B])
