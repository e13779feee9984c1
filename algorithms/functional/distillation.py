"""Distillation: divergences between a student and a teacher at every token, and the sampled-token estimator.

`student_BTV` and `teacher_BTV` are log-probs over one vocabulary (normalised; a temperature is the caller's, before the
log-softmax). Each divergence is (B, T), 0 outside `mask_BT`, and slots outside it may hold anything. A token of
probability 0 (log-prob -inf) adds nothing where it is weighted by 0, so two models may rule out different tokens.
"""

import math

import torch
from torch import Tensor


def _divergence(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """KL(p || q) = sum_v p (log p - log q), (N,), from log-probs; where p is 0 a term is 0, in value and gradient."""
    absent_NV = p_NV.detach().exp() == 0
    p_NV, q_NV = p_NV.masked_fill(absent_NV, 0.0), q_NV.masked_fill(absent_NV, 0.0)
    return (p_NV.exp() * (p_NV - q_NV)).sum(-1)


def _spread(values_N: Tensor, mask_BT: Tensor) -> Tensor:
    out_BT = values_N.new_zeros(mask_BT.shape)
    out_BT[mask_BT] = values_N
    return out_BT


def forward_kl(student_BTV: Tensor, teacher_BTV: Tensor, mask_BT: Tensor) -> Tensor:
    """KL(teacher || student) = sum_v p_T (log p_T - log p_S): covers the teacher's modes (Hinton, 1503.02531)."""
    return _spread(_divergence(teacher_BTV[mask_BT], student_BTV[mask_BT]), mask_BT)


def reverse_kl(student_BTV: Tensor, teacher_BTV: Tensor, mask_BT: Tensor) -> Tensor:
    """KL(student || teacher) = sum_v p_S (log p_S - log p_T): seeks the teacher's modes (MiniLLM, 2306.08543)."""
    return _spread(_divergence(student_BTV[mask_BT], teacher_BTV[mask_BT]), mask_BT)


def generalised_jsd(student_BTV: Tensor, teacher_BTV: Tensor, mask_BT: Tensor, beta: float) -> Tensor:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta p_T + (1 - beta) p_S (GKD, 2306.13649, eq. 1).

    beta = 0.5 is the Jensen-Shannon divergence. As printed the value vanishes at both ends, and it is JSD / beta that
    tends to the forward KL for beta -> 0, JSD / (1 - beta) to the reverse KL for beta -> 1. By convention (the paper's
    and TRL's) beta = 0 is the forward KL and beta = 1 the reverse KL: the scale jumps at the ends.
    """
    assert 0 <= beta <= 1, "beta is a mixture weight"
    if beta == 0:
        return forward_kl(student_BTV, teacher_BTV, mask_BT)
    if beta == 1:
        return reverse_kl(student_BTV, teacher_BTV, mask_BT)
    student_NV, teacher_NV = student_BTV[mask_BT], teacher_BTV[mask_BT]
    # The lowest finite number for -inf keeps logaddexp's gradient a number where both are -inf; the value is the same.
    finite_NV = student_NV.clamp(min=torch.finfo(student_NV.dtype).min)
    mixture_NV = torch.logaddexp(teacher_NV + math.log(beta), finite_NV + math.log1p(-beta))
    jsd_N = beta * _divergence(teacher_NV, mixture_NV) + (1 - beta) * _divergence(student_NV, mixture_NV)
    return _spread(jsd_N, mask_BT)


def over_common_tokens(student_BTV: Tensor, teacher_BTV: Tensor) -> tuple[Tensor, Tensor]:
    """Both over the tokens that both have, normalised anew where something was cut: models of one family pad one
    vocabulary to different sizes, and what only one of them has stands for no text."""
    common = min(student_BTV.shape[-1], teacher_BTV.shape[-1])
    cut = [x[..., :common].log_softmax(-1) if x.shape[-1] > common else x for x in (student_BTV, teacher_BTV)]
    return cut[0], cut[1]


def listed_and_others(logprobs_BTV: Tensor, ids_BTK: Tensor) -> Tensor:
    """(B, T, K + 1) log-probs of the K listed tokens, all different, and last of all others together; K below V.

    A divergence between two such vectors is that between the models once what is not listed counts as one token: at
    most the whole vocabulary's, and 0 where the models agree on what is listed. ValueError for an id that is not in V.
    """
    ids_BTK = ids_BTK.to(torch.int64)
    if ids_BTK.numel() and int(ids_BTK.max()) >= logprobs_BTV.shape[-1]:
        raise ValueError(
            f"distillation: the teacher lists token {int(ids_BTK.max())}, the student has {logprobs_BTV.shape[-1]} "
            "tokens: such a token stands for no text of the run. Look at the teacher's weights, or lower top_k"
        )
    others_BT1 = logprobs_BTV.scatter(-1, ids_BTK, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs_BTV.gather(-1, ids_BTK), others_BT1], -1)


@torch.no_grad()
def sampled_reverse_kl_advantages(student_BT: Tensor, teacher_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log p_T - log p_S of sampled tokens, (B, T), without gradient, 0 outside the mask: minus k1 of the reverse KL.

    As the advantage of a policy-gradient loss -A log p_S on the student's own samples, its expected gradient is that
    of the reverse KL at each visited state (on-policy distillation: GKD, 2306.13649, with beta = 1; Thinking Machines
    Lab, "On-Policy Distillation", 2025). What a token does to later states is not counted.
    """
    return _spread(teacher_BT[mask_BT] - student_BT[mask_BT], mask_BT)
