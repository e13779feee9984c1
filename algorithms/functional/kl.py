"""Estimators of KL(policy || reference) from x = logprobs - ref_logprobs of sampled tokens, the exact KL over the
vocabulary, and the controllers of its coefficient.

k1, k2 and k3 are named by J. Schulman, "Approximating KL divergence" (2020). As a *reward* use k1. As a *loss*, k1's
gradient does not contain the reference at all: use k2, whose gradient on-policy is the exact KL's, or k3, whose value
is unbiased but whose gradient is that of KL(reference || policy).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from algorithms.functional.masked import zeroed
from algorithms.functional.ratios import LOG_RATIO_BOUND

Estimator = Literal["k1", "k2", "k3", "absolute"]
Direction = Literal["reverse", "forward"]


def estimate(kind: Estimator, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Per token, any shape. k1 = x; k2 = x^2 / 2; k3 = exp(-x) - 1 + x; absolute = |x|. 0 at masked slots. The exponent
    of k3 is held at 20 (`ratios`)."""
    logprobs, ref_logprobs = zeroed(mask, logprobs, ref_logprobs)
    x = logprobs - ref_logprobs
    if kind == "k1":
        return x
    if kind == "k2":
        return 0.5 * x * x
    if kind == "k3":
        return torch.expm1(x.neg().clamp(max=LOG_RATIO_BOUND)) + x
    return x.abs()


def full_vocabulary(
    direction: Direction, logprobs_BTV: Tensor, ref_logprobs_BTV: Tensor, mask_BT: Tensor | None = None
) -> Tensor:
    """(B, T): the exact KL of normalised log-probs over the vocabulary; any leading shape. 0 at masked slots.

    reverse: KL(policy || reference) = sum_v p (log p - log q); forward: KL(reference || policy). A token of
    probability 0 (log-prob -inf) under the first distribution adds 0, in value and gradient.
    """
    first_BTV, second_BTV = logprobs_BTV, ref_logprobs_BTV
    if direction == "forward":
        first_BTV, second_BTV = second_BTV, first_BTV
    support_BTV = first_BTV > float("-inf")
    if mask_BT is not None:
        support_BTV = support_BTV & mask_BT[..., None]
    first_BTV, second_BTV = zeroed(support_BTV, first_BTV, second_BTV)
    return (first_BTV.exp() * (first_BTV - second_BTV)).sum(-1)


@dataclass(frozen=True)
class FixedKL:
    """The coefficient stays what it is."""

    def next(self, beta: float, observed: float, samples: int) -> float:
        return beta


@dataclass(frozen=True)
class AdaptiveKL:
    """Ziegler et al. (1909.08593, section 2.2): error = clip(KL / target - 1, -0.2, 0.2);
    beta *= 1 + error * samples / horizon."""

    target: float
    horizon: int

    def next(self, beta: float, observed: float, samples: int) -> float:
        error = min(max(observed / self.target - 1, -0.2), 0.2)
        return beta * (1 + error * samples / self.horizon)
