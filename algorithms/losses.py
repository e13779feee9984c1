"""Losses as values: what an algorithm sends to a worker. Each is a frozen dataclass, so it pickles and prints."""

from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.correcting import CorrectionSettings, correction_metrics
from algorithms.functional import kl, value_losses
from algorithms.functional.ratios import ratio
from algorithms.objectives import Objective, Terms
from hybridflow.loss import Atom, LossInputs, Output
from hybridflow.metrics import Metric, Metrics


def mean_over(values: Tensor, mask_BT: Tensor) -> Metric:
    """Mean over trainable tokens, as (sum, count)."""
    picked = values[mask_BT].detach().to(torch.float64)
    return Metric(float(picked.sum()), float(picked.numel()))


def max_over(values: Tensor, mask_BT: Tensor) -> Metric:
    picked = values[mask_BT].detach()
    return Metric(float(picked.max()) if picked.numel() else 0.0, 1.0, "max")


def per_token(column: Tensor, mask_BT: Tensor) -> Tensor:
    """A one-value-a-row column (B,) spread over its row; a token-level column as it is."""
    return column[:, None].expand_as(mask_BT) if column.ndim == 1 else column


@dataclass(frozen=True)
class PolicyLoss:
    """A policy objective, with what all of them share: a correction, KL to the reference, entropy.

    old_column: the log-probs under the policy before this update; None means detached current ones (one strictly
    on-policy step, ratio 1). The correction multiplies the objective alone.
    """

    temperature: float
    objective: Objective
    old_column: str | None = "old_logprobs"
    correction: CorrectionSettings | None = None
    kl_coef: float = 0.0
    kl_estimator: kl.Estimator = "k3"
    entropy_coef: float = 0.0
    outputs: tuple[Output, ...] = ("logprobs", "entropies")
    atom: Atom = "row"

    @property
    def columns(self) -> tuple[str, ...]:
        old = (self.old_column,) if self.old_column else ()
        reference = ("ref_logprobs",) if self.kl_coef else ()
        return tuple(dict.fromkeys(("advantages", "rollout_logprobs", *old, *reference)))

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Metric]]:
        mask_BT, logprobs_BT = inputs.mask_BT, inputs.outputs["logprobs"]
        advantages_BT = per_token(inputs.columns["advantages"], mask_BT)
        old_BT = inputs.columns[self.old_column] if self.old_column else logprobs_BT.detach()
        loss_BT, active_BT = self.objective(Terms(logprobs_BT, old_BT, advantages_BT, mask_BT))
        metrics = self._metrics(inputs, loss_BT)
        if self.old_column:  # else every ratio is 1, and these could not move
            metrics |= _movement(logprobs_BT - old_BT, mask_BT)
            metrics |= {} if active_BT is None else {"actor/pg_clipfrac": mean_over(active_BT, mask_BT)}
        if self.correction:
            factor_BT, found = self.correction.factors(old_BT, inputs.columns["rollout_logprobs"], mask_BT)
            loss_BT = loss_BT * factor_BT
            metrics |= correction_metrics(found)
        if self.kl_coef:
            kl_BT = kl.estimate(self.kl_estimator, logprobs_BT, inputs.columns["ref_logprobs"])
            loss_BT = loss_BT + self.kl_coef * kl_BT
            metrics["actor/kl_loss"] = mean_over(kl_BT, mask_BT)
        if self.entropy_coef:
            loss_BT = loss_BT - self.entropy_coef * inputs.outputs["entropies"]
        return loss_BT, metrics

    def _metrics(self, inputs: LossInputs, loss_BT: Tensor) -> Metrics:
        mask_BT = inputs.mask_BT
        mismatch_BT = inputs.outputs["logprobs"] - inputs.columns["rollout_logprobs"]
        return {
            "actor/pg_loss": mean_over(loss_BT, mask_BT),
            "actor/entropy": mean_over(inputs.outputs["entropies"], mask_BT),
            "rollout/logratio_max": max_over(mismatch_BT.abs(), mask_BT),
            "rollout/logratio_mean": mean_over(mismatch_BT, mask_BT),
        }


def _movement(moved_BT: Tensor, mask_BT: Tensor) -> Metrics:
    """How far the policy is from the one before the update."""
    return {
        "actor/ppo_kl": mean_over(-moved_BT, mask_BT),
        "actor/ratio_max": max_over(ratio(moved_BT), mask_BT),
    }


@dataclass(frozen=True)
class ValueLoss:
    """Clipped regression of a critic on `<prefix>returns`, against its `<prefix>values` of before the update."""

    clip: float | None
    prefix: str = ""
    temperature: float = 1.0
    outputs: tuple[Output, ...] = ("values",)
    atom: Atom = "row"

    @property
    def columns(self) -> tuple[str, ...]:
        return (f"{self.prefix}values", f"{self.prefix}returns")

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Metric]]:
        mask_BT, values_BT = inputs.mask_BT, inputs.outputs["values"]
        before_BT, returns_BT = (inputs.columns[name] for name in self.columns)
        loss_BT, active_BT = value_losses.clipped_mse(values_BT, before_BT, returns_BT, self.clip)
        metrics = {
            f"{self.prefix}critic/vf_loss": mean_over(loss_BT, mask_BT),
            f"{self.prefix}critic/vpred_mean": mean_over(values_BT, mask_BT),
        }
        clipped = {} if self.clip is None else {f"{self.prefix}critic/vf_clipfrac": mean_over(active_BT, mask_BT)}
        return loss_BT, metrics | clipped


@dataclass(frozen=True)
class SupervisedLoss:
    """Cross-entropy of the given responses."""

    temperature: float = 1.0
    outputs: tuple[Output, ...] = ("logprobs",)
    columns: tuple[str, ...] = ()
    atom: Atom = "row"

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Metric]]:
        loss_BT = -inputs.outputs["logprobs"]
        return loss_BT, {"actor/nll": mean_over(loss_BT, inputs.mask_BT)}
