"""What a contract test raises, and the comparisons that it makes."""

import math
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hybridflow.metrics import Metric


class ContractViolation(AssertionError):
    """What was found, what the contract says, and what to do."""


def require(condition: bool, text: str) -> None:
    if not condition:
        raise ContractViolation(text)


def pickled(value: Any, what: str) -> Any:
    """A copy, as a rank gets it."""
    try:
        return pickle.loads(pickle.dumps(value))
    except Exception as error:  # pickling raises whatever the object's parts raise
        raise ContractViolation(
            f"{what}: {value!r} does not pickle ({type(error).__name__}: {error}). Make it a dataclass at the top of a "
            "module, with plain fields"
        ) from error


def require_close(found: Tensor, expected: Tensor, tolerance: float, text: str) -> None:
    """The largest difference is at most `tolerance` of the largest expected number."""
    require(found.shape == expected.shape, f"{text}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    if not expected.numel():
        return
    scale = float(expected.abs().max())
    error = float((found.double() - expected.double()).abs().max())
    require(error <= tolerance * scale, f"{text}: differs by {error:.1e} where the largest is {scale:.1e}")


def require_same(found: Mapping[str, Metric], expected: Mapping[str, Metric], text: str) -> None:
    """Not one metric differs; NaN is the same as NaN."""
    require(found.keys() == expected.keys(), f"{text}: metrics {sorted(found.keys() ^ expected.keys())} come and go")
    for name, metric in found.items():
        other, now = expected[name].value, metric.value
        both_nan = math.isnan(other) and math.isnan(now)
        require(both_nan or other == now, f"{text}: metric {name} is {now}, without it {other}")


def require_near(found: Mapping[str, Metric], expected: Mapping[str, Metric], tolerance: float, text: str) -> None:
    """As `require_same`, up to rounding: relative to the larger of the number and 1."""
    require(found.keys() == expected.keys(), f"{text}: metrics {sorted(found.keys() ^ expected.keys())} come and go")
    for name, metric in found.items():
        other, now = expected[name].value, metric.value
        near = math.isclose(now, other, rel_tol=tolerance, abs_tol=tolerance) or (math.isnan(now) and math.isnan(other))
        require(near, f"{text}: metric {name} is {now}, expected {other}; sum what is merged, and divide at the end")


def require_finite(metrics: Mapping[str, Metric], text: str) -> None:
    for name, metric in metrics.items():
        require(isinstance(metric, Metric), f"{text}: {name} is a {type(metric).__name__}; a metric is a Metric")
        require(math.isfinite(metric.value), f"{text}: metric {name} is {metric.value}")


def largest(tensors: Mapping[str, Tensor]) -> float:
    return max((float(tensor.abs().max()) for tensor in tensors.values() if tensor.numel()), default=0.0)


def flattened(tensors: Mapping[str, Tensor]) -> Tensor:
    """All of them in one row, by name."""
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])
