"""`check_loss` on every loss that is shipped, with junk where an engine would hand it zeros."""

import inspect
import pkgutil
from importlib import import_module
from typing import Any

import pytest

import algorithms
from algorithms import objectives, preference_rows
from algorithms.correcting import CorrectionSettings
from algorithms.distilling import DivergenceLoss
from algorithms.functional.preference_losses import PAIR_LOSSES, PairSettings
from algorithms.losses import PolicyLoss, SupervisedLoss, ValueLoss
from algorithms.preference import CONSTANTS
from algorithms.preference_rows import KTOLoss, PreferenceLoss
from algorithms.reward_losses import BradleyTerryLoss, StepLoss
from hybridflow.testing import check_loss

OBJECTIVES: list[Any] = [
    objectives.ClippedRatio(0.2, 0.28), objectives.ClippedRatio(0.2, 0.2, dual_clip=3.0),
    objectives.SequenceRatio(0.1, 0.2), objectives.GeometricMeanRatio(0.4, 0.4), objectives.SoftGate(1.0, 1.05),
    objectives.ClippedWeight(1.0, 4.0), objectives.TruncatedWeight(5.0), objectives.LogProbability(),
    objectives.AdvantageWeighted(0.5, 20.0),
]  # fmt: skip
CORRECTIONS = [CorrectionSettings(kind=kind) for kind in ("tis", "mis", "icepop")]
SETTINGS = PairSettings(beta=0.3, label_smoothing=0.1)
FIXED = {
    name: preference_rows.PreferenceLoss(name, SETTINGS)
    for name, entry in PAIR_LOSSES.items()
    if entry.constants is None
}
LOSSES: dict[str, Any] = {
    **{repr(objective): PolicyLoss(0.8, objective) for objective in OBJECTIVES},
    **{repr(c): PolicyLoss(0.8, OBJECTIVES[0], correction=c, kl_coef=0.1, entropy_coef=0.01) for c in CORRECTIONS},
    "policy, detached": PolicyLoss(0.8, OBJECTIVES[0], old_column=None, kl_coef=0.1, kl_estimator="k2"),
    "value": ValueLoss(0.2),
    "value, not clipped": ValueLoss(None),
    "supervised": SupervisedLoss(),
    **FIXED,
    "kto": KTOLoss(0.1, 1.0, 1.3, baseline=0.2),
    "bradley-terry": BradleyTerryLoss(0.1, margin=True),
    "steps": StepLoss(),
    "divergence": DivergenceLoss(0.8, 0.4, listed=False),
}


def test_the_losses_are_all_of_them() -> None:
    modules = [import_module(f"algorithms.{found.name}") for found in pkgutil.iter_modules(algorithms.__path__)]
    defined = {
        name
        for module in modules
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__ == module.__name__ and "outputs" in getattr(cls, "__dataclass_fields__", {})
    }
    assert defined == {type(loss).__name__ for loss in LOSSES.values()}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_keeps_the_contract(name: str) -> None:
    check_loss(LOSSES[name])


@pytest.mark.parametrize("name", sorted(set(PAIR_LOSSES) - set(FIXED)))
def test_a_coupled_loss_keeps_the_contract_once_it_has_its_constants(name: str) -> None:
    """Here any numbers; `test_algorithms.py` has them computed over the step."""
    count = len(inspect.signature(PAIR_LOSSES[name].loss).parameters) - 2
    assert 0 < count <= len(CONSTANTS)
    check_loss(PreferenceLoss(name, SETTINGS, constants=CONSTANTS[:count]))
