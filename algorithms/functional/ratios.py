"""Probability ratios that stay finite, in value and gradient."""

from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""|log ratio| is held at this (a ratio of 4.9e8): exp of more overflows float32 at 88, and inf x 0 in its gradient is
NaN. Beyond it the value stays and the gradient is 0."""


def ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
