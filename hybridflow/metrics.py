"""A metric leaves a rank as (sum, weight, reduction), so that merging over ranks and micro-batches is exact."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Reduction = Literal["mean", "sum", "max", "min", "effective"]


@dataclass(frozen=True)
class Metric:
    """mean: `total / weight`; sum: `total`; max and min: `total` is the extreme and `weight` is ignored; effective:
    `total**2 / weight`, of the sums of weights and of their squares: how many equal samples they are worth."""

    total: float
    weight: float = 1.0
    reduction: Reduction = "mean"

    @property
    def value(self) -> float:
        if self.reduction == "mean":
            return self.total / self.weight if self.weight else float("nan")
        if self.reduction == "effective":
            return self.total**2 / self.weight if self.weight else 0.0
        return self.total

    def merge(self, other: "Metric") -> "Metric":
        assert self.reduction == other.reduction, f"{self.reduction} and {other.reduction} do not merge"
        if self.reduction == "max":
            return Metric(max(self.total, other.total), 1.0, "max")
        if self.reduction == "min":
            return Metric(min(self.total, other.total), 1.0, "min")
        return Metric(self.total + other.total, self.weight + other.weight, self.reduction)


Metrics = dict[str, Metric]


def merge(parts: Iterable[Mapping[str, Metric]]) -> Metrics:
    """Merge in the order given (sums have a fixed order)."""
    merged: Metrics = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name].merge(metric) if name in merged else metric
    return merged


def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    return {name: metric.value for name, metric in metrics.items()}
