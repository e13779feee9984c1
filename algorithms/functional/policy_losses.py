"""Per-token policy losses, before aggregation: any common shape, so that (B, T) is one of them.

Log-ratios are held at +-20 (`ratios`). With a mask, junk at masked slots changes neither value nor gradient: loss 0
and active False there.
"""

import math

import torch
from torch import Tensor

from algorithms.functional.masked import zeroed
from algorithms.functional.ratios import ratio


def ppo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)), rho = exp(logprobs - old) (PPO, 1707.06347, eq. 7;
    clip_high > clip_low is DAPO's clip-higher, 2503.14476). With `dual_clip` c, for A < 0: min(that, -c A)
    (1912.09729).

    Returns the loss and whether the clipped branch was the active one (bool, same shape).
    """
    logprobs, old_logprobs, advantages = zeroed(mask, logprobs, old_logprobs, advantages)
    rho = ratio(logprobs - old_logprobs)
    plain = -advantages * rho
    clipped = -advantages * rho.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss, clipped > plain


def reinforce(logprobs: Tensor, advantages: Tensor, mask: Tensor | None = None) -> Tensor:
    """-A logprobs (Williams 1992)."""
    logprobs, advantages = zeroed(mask, logprobs, advantages)
    return -advantages * logprobs


def awr(
    logprobs: Tensor, advantages: Tensor, beta: float, weight_max: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """-min(exp(A / beta), weight_max) logprobs, the weight without gradient (AWR, 1910.00177; the cap is
    20 there). The loss of DigiRL's offline-to-online recipe. Returns the loss and where the cap held."""
    logprobs, advantages = zeroed(mask, logprobs, advantages)
    exponents = advantages.detach() / beta
    loss = -exponents.clamp(max=math.log(weight_max)).exp() * logprobs
    active = exponents > math.log(weight_max)
    return loss, active if mask is None else active & mask


def sapo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    mask: Tensor | None = None,
) -> Tensor:
    """-A (4 / tau) sigmoid(tau (rho - 1)), tau = tau_positive for A > 0, tau_negative otherwise (SAPO, 2511.20347).
    A soft gate clips nothing. The paper's average is sequence_mean_token_mean."""
    logprobs, old_logprobs, advantages = zeroed(mask, logprobs, old_logprobs, advantages)
    rho = ratio(logprobs - old_logprobs)
    tau = torch.full_like(advantages, tau_negative).masked_fill(advantages > 0, tau_positive)
    return -advantages * (4 / tau) * torch.sigmoid(tau * (rho - 1))


def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-stop_gradient(clip(rho, 1 - clip_low, 1 + clip_high)) A logprobs (CISPO, 2506.13585, eq. 4 and 5): every token
    keeps a gradient. clip_low = 1 leaves no lower bound, as the paper runs it. Returns the loss and where rho was
    outside the bounds."""
    return _ratio_weighted(logprobs, old_logprobs, advantages, 1 - clip_low, 1 + clip_high, mask)


def truncated_cispo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, ratio_max: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """-stop_gradient(min(rho, ratio_max)) A logprobs (ScaleRL's CISPO, 2510.13786). The bound is on rho itself. Returns
    the loss and where rho was above it."""
    return _ratio_weighted(logprobs, old_logprobs, advantages, 0.0, ratio_max, mask)


def _ratio_weighted(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    logprobs, old_logprobs, advantages = zeroed(mask, logprobs, old_logprobs, advantages)
    rho = ratio((logprobs - old_logprobs).detach())
    active = (rho < low) | (rho > high)
    loss = -rho.clamp(low, high) * advantages * logprobs
    return loss, active if mask is None else active & mask
