"""Corrections for samples of another policy than the one updated: settings and values (`functional.corrections`)."""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from algorithms.functional import corrections
from algorithms.functional.corrections import Level, RatioStatistics
from hybridflow.batch import Batch
from hybridflow.metrics import Metric, Metrics
from hybridflow.settings import Settings


class CorrectionSettings(Settings):
    """Multiplies the policy loss by a function of k = exp(old - rollout log-prob).

    kind: tis, min(k, cap); mis, k up to cap, else 0; icepop, k within low and high, else 0. mis with old_logprobs
    recomputed and a token level is decoupled PPO (2505.24298).
    """

    kind: Literal["tis", "mis", "icepop"] = "tis"
    level: Level = "token"
    cap: float = Field(2.0, gt=0)
    low: float = Field(0.5, gt=0)
    high: float = Field(5.0, gt=0)

    @model_validator(mode="after")
    def _reads_what_it_is_given(self) -> Self:
        idle = self.changed("cap") if self.kind == "icepop" else self.changed("low", "high")
        if idle:
            reader = "cap" if self.kind != "icepop" else "low and high"
            raise ValueError(f"{', '.join(idle)}: kind={self.kind} does not read it, but {reader}; remove it")
        return self

    def factors(self, old_BT: Tensor, rollout_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, RatioStatistics]:
        if self.kind == "icepop":
            return corrections.icepop(old_BT, rollout_BT, mask_BT, self.low, self.high, self.level)
        function = corrections.tis if self.kind == "tis" else corrections.mis
        return function(old_BT, rollout_BT, mask_BT, self.cap, self.level)


def correction_metrics(found: RatioStatistics) -> Metrics:
    return {
        "correction/ratio_mean": Metric(found.ratio_sum, found.count),
        "correction/ratio_max": Metric(found.ratio_max, 1.0, "max"),
        "correction/cut_share": Metric(found.cut, found.count),
        "correction/effective_samples": Metric(found.factor_sum, found.factor_sum_sq, "effective"),
    }


class RejectionSettings(Settings):
    """Drops a sequence whose divergence between rollout and old log-probs is above `bound` (nats)."""

    estimator: Literal["k1", "k2", "k3"] = "k3"
    over: Literal["mean", "max"] = "mean"
    bound: float = Field(gt=0)


@dataclass(frozen=True)
class Rejection:
    """Runs where the rows are. Writes, one a row: `kept`, and `stale_ratio`, the geometric mean of old over rollout
    probability."""

    settings: RejectionSettings
    old_column: str

    @property
    def columns(self) -> tuple[str, ...]:
        return ("response_mask", "rollout_logprobs", self.old_column)

    def __call__(self, batch: Batch) -> Batch:
        mask_BT = batch.ragged("response_mask").padded().bool()
        old_BT, rollout_BT = batch.ragged(self.old_column).padded(), batch.ragged("rollout_logprobs").padded()
        wanted = self.settings
        kept_B, _ = corrections.reject(old_BT, rollout_BT, mask_BT, wanted.bound, wanted.estimator, wanted.over)
        ratio_BT = corrections.ratios(old_BT, rollout_BT, mask_BT, "geometric")
        ratio_B = ratio_BT.amax(1) if ratio_BT.shape[1] else ratio_BT.new_zeros(len(ratio_BT))
        return Batch({"kept": kept_B.to(torch.bool), "stale_ratio": ratio_B.double()})


def rejection_metrics(kept_B: Tensor, ratio_B: Tensor) -> Metrics:
    """kept_B: bool. ratio_B: `stale_ratio` of the same rows. A row is kept whole or not at all, so the effective sample
    size is the share that is kept."""
    count = float(len(kept_B))
    return {
        "correction/rejected_share": Metric(float((~kept_B).sum()), count),
        "correction/row_ratio_mean": Metric(float(ratio_B.sum()), count),
        "correction/row_ratio_max": Metric(float(ratio_B.max()) if len(ratio_B) else 0.0, 1.0, "max"),
    }
