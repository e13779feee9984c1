"""Policy losses whose ratio belongs to a sequence (B, T).

Each returns the sequence's value spread on its trainable tokens, so the weights of sequence_mean_token_mean,
1 / (N L_i), give the mean over sequences that the papers write, and its gradient. Any mode that weighs the tokens of
short and long sequences alike (token_mean) is another loss: refuse it. Advantages are constant along a row.
"""

import torch
from torch import Tensor

from algorithms.functional.masked import row_mean, spread, zeroed
from algorithms.functional.policy_losses import ppo
from algorithms.functional.ratios import ratio


def gspo(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> tuple[Tensor, Tensor]:
    """max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high)), s = exp(mean_t (logprobs - old)) (GSPO, 2507.18071, eq. 5
    and 7). The gradient of s reaches every trainable token of the row: ds / dlogprobs_t = s / L. Returns the loss and
    whether the clipped branch was the active one."""
    log_ratio_BT = spread(row_mean(logprobs_BT - old_logprobs_BT, mask_BT), mask_BT)
    return ppo(log_ratio_BT, torch.zeros_like(log_ratio_BT), advantages_BT, clip_low, clip_high, mask=mask_BT)


def gmpo(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
) -> tuple[Tensor, Tensor]:
    """-A exp(mean_t [sgn(A) min(sgn(A) d, sgn(A) clip(d, -clip_low, clip_high))]), d = logprobs - old (GMPO,
    2507.20673): the geometric mean of token ratios, each clipped in log space. Returns the loss and whether a
    token's clipped branch was the active one: that token has no gradient, the others of its row keep theirs."""
    logprobs_BT, old_logprobs_BT, advantages_BT = zeroed(mask_BT, logprobs_BT, old_logprobs_BT, advantages_BT)
    moved_BT, sign_BT = logprobs_BT - old_logprobs_BT, advantages_BT.sign()
    plain_BT, clipped_BT = sign_BT * moved_BT, sign_BT * moved_BT.clamp(-clip_low, clip_high)
    ratio_B = ratio(row_mean(sign_BT * torch.minimum(plain_BT, clipped_BT), mask_BT))
    return -advantages_BT * ratio_B[:, None], clipped_BT < plain_BT
