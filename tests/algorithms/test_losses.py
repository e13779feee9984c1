"""What all policy losses share (correction, KL, entropy, metrics) and the critic's loss, through the engine's own way
from rows to what a loss sees. The objectives' values are tested with the functions that they call."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from algorithms.correcting import CorrectionSettings
from algorithms.functional import kl
from algorithms.losses import PolicyLoss, SupervisedLoss, ValueLoss
from algorithms.objectives import (
    AdvantageWeighted,
    ClippedRatio,
    ClippedWeight,
    GeometricMeanRatio,
    LogProbability,
    Objective,
    SequenceRatio,
    SoftGate,
    TruncatedWeight,
)
from hybridflow.batch import Batch, Ragged
from hybridflow.loss import Loss, LossInputs
from hybridflow.metrics import Metric
from workers.training.microbatch import loss_inputs, training_micro_batches

OBJECTIVES: list[Objective] = [
    ClippedRatio(0.2, 0.28), ClippedRatio(0.2, 0.2, 3.0), SequenceRatio(3e-4, 4e-4), GeometricMeanRatio(0.1, 0.1),
    SoftGate(1.0, 1.05), ClippedWeight(0.5, 0.3), TruncatedWeight(1.1), LogProbability(), AdvantageWeighted(0.5, 2.0),
]  # fmt: skip
MASK = [[0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 1], [0, 0, 0, 1, 1, 0]]
LENGTHS = [6, 6, 6]
TIS = CorrectionSettings(cap=1.5)
FULL = PolicyLoss(1.0, ClippedRatio(0.2, 0.2), correction=TIS, kl_coef=0.1, kl_estimator="k3", entropy_coef=0.2)


def batch(seed: int = 0, junk: float = 0.0, **columns: Tensor) -> Batch:
    """Three rows; every token-level column holds `junk` at masked slots."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor(MASK, dtype=torch.bool).flatten()
    found: dict[str, Any] = {
        "tokens": Ragged(torch.arange(18), torch.tensor(LENGTHS)),
        "response_mask": Ragged(mask, torch.tensor(LENGTHS)),
        "loss_weight": torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
        "advantages": torch.tensor([1.5, -0.5, 0.25], dtype=torch.float64) + seed * torch.tensor([-0.3, 0.1, 0.0]),
    }
    for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs", "values", "returns", "now", "entropies"):
        numbers = -torch.rand(18, generator=generator, dtype=torch.float64)
        numbers = columns.get(name, numbers if name != "entropies" else -numbers)
        found[name] = Ragged(numbers.masked_fill(~mask, junk), torch.tensor(LENGTHS))
    return Batch(found)


def seen(loss: Loss, rows: Batch, now: Tensor) -> LossInputs:
    """As the engine builds it: outputs exist at trainable positions alone. `now` (18,) stands for the model."""
    [micro] = training_micro_batches(rows, loss, budget_tokens=1000)
    order = (micro.rows_B[:, None] * 6 + torch.arange(6)).flatten()[micro.index_N]
    entropies = rows.ragged("entropies").flat
    outputs = {name: (entropies if name == "entropies" else now)[order] for name in loss.outputs}
    return loss_inputs(micro, rows, loss, outputs, torch.device("cpu"))


def apply(loss: Loss, rows: Batch, now: Tensor | None = None) -> tuple[float, Tensor, dict[str, Metric]]:
    """The weighted sum, its gradient with respect to the model's outputs, and the metrics."""
    leaf = (rows.ragged("now").flat if now is None else now).clone().requires_grad_()
    inputs = seen(loss, rows, leaf)
    loss_BT, metrics = loss(inputs)
    assert loss_BT.shape == inputs.mask_BT.shape
    total = (loss_BT[inputs.mask_BT] * inputs.weight_B[:, None].expand_as(loss_BT)[inputs.mask_BT]).sum()
    (gradient,) = torch.autograd.grad(total, leaf)
    return float(total.detach()), gradient, metrics


def weights() -> Tensor:
    """(18,): the loss weight at trainable slots."""
    return (torch.tensor(MASK) * torch.tensor([[0.1], [0.2], [0.3]], dtype=torch.float64)).flatten()


BOUNDS: dict[str, dict[str, float]] = {"tis": {"cap": 1.2}, "mis": {"cap": 1.2}, "icepop": {"low": 0.8, "high": 1.3}}
ALL_LOSSES: list[Loss] = [
    *(replace(FULL, objective=objective) for objective in OBJECTIVES),
    *(replace(FULL, correction=CorrectionSettings(kind=kind, level=level, **BOUNDS[kind]))
      for kind in ("tis", "mis", "icepop") for level in ("token", "sequence", "geometric")),
    *(replace(FULL, kl_estimator=name) for name in ("k2", "k3", "absolute")),
    replace(FULL, old_column=None, correction=None), ValueLoss(0.2), ValueLoss(None), SupervisedLoss(),
]  # fmt: skip


@pytest.mark.parametrize("loss", ALL_LOSSES, ids=repr)
@pytest.mark.parametrize("junk", [math.nan, math.inf, 123.0])
def test_junk_at_masked_slots_changes_nothing(loss: Loss, junk: float) -> None:
    clean, dirty = apply(loss, batch()), apply(loss, batch(junk=junk))
    assert dirty[0] == clean[0] and math.isfinite(clean[0])
    assert torch.equal(dirty[1], clean[1]) and clean[1].isfinite().all()
    assert dirty[2] == clean[2] and all(math.isfinite(metric.value) for metric in clean[2].values())


DETACHED = {
    replace(FULL, objective=ClippedWeight(0.5, 0.3)), replace(FULL, objective=TruncatedWeight(1.1)),
    replace(FULL, old_column=None, correction=None),
}  # fmt: skip
"""Part of their ratio has no gradient: they are no antiderivative of it."""


@pytest.mark.parametrize("loss", [loss for loss in ALL_LOSSES if loss not in DETACHED], ids=repr)
def test_the_gradient_is_that_of_finite_differences(loss: Loss) -> None:
    rows = batch()
    _, gradient, _ = apply(loss, rows)
    start, step = rows.ragged("now").flat, 1e-6
    for slot in torch.tensor(MASK).flatten().nonzero()[:, 0]:
        up, down = start.clone(), start.clone()
        up[slot], down[slot] = up[slot] + step, down[slot] - step
        numeric = (apply(loss, rows, up)[0] - apply(loss, rows, down)[0]) / (2 * step)
        assert float(gradient[slot]) == pytest.approx(numeric, rel=1e-6, abs=1e-9)


def test_what_is_detached_gives_the_gradient_of_a_weighted_log_likelihood() -> None:
    """-ratio A log p with the ratio held: clipped (CISPO), truncated (ScaleRL), or 1 (a policy against itself)."""
    rows = batch()
    ratio = (rows.ragged("now").flat - rows.ragged("old_logprobs").flat).exp()
    advantages = rows.tensor("advantages").repeat_interleave(6)
    bare = replace(FULL, correction=None, kl_coef=0.0, entropy_coef=0.0)
    cases = [
        (replace(bare, objective=ClippedWeight(0.5, 0.3)), ratio.clamp(0.5, 1.3)),
        (replace(bare, objective=TruncatedWeight(1.1)), ratio.clamp(max=1.1)),
        (replace(bare, old_column=None), torch.ones_like(ratio)),
    ]
    for loss, weight in cases:
        _, gradient, _ = apply(loss, rows)
        torch.testing.assert_close(gradient, -weight * advantages * weights(), rtol=1e-10, atol=1e-14)


def test_entropy_is_rewarded() -> None:
    plain, kept = apply(replace(FULL, entropy_coef=0.0), batch())[0], apply(FULL, batch())[0]
    entropies = batch().ragged("entropies").flat
    assert (entropies >= 0).all()
    assert kept - plain == pytest.approx(-0.2 * float((entropies * weights()).sum()), rel=1e-12)


@pytest.mark.parametrize("estimator", ["k2", "k3", "absolute"])
def test_the_kl_to_the_reference_is_added(estimator: kl.Estimator) -> None:
    rows = batch()
    without = apply(replace(FULL, kl_coef=0.0), rows)
    total, _, metrics = apply(replace(FULL, kl_estimator=estimator), rows)
    x = rows.ragged("now").flat - rows.ragged("ref_logprobs").flat
    value = {"k2": x**2 / 2, "k3": (-x).exp() - 1 + x, "absolute": x.abs()}[estimator]
    assert total - without[0] == pytest.approx(0.1 * float((value * weights()).sum()), rel=1e-10)
    picked = value[torch.tensor(MASK).flatten().bool()]
    assert metrics["actor/kl_loss"].value == pytest.approx(float(picked.mean()), rel=1e-12)
    assert "actor/kl_loss" not in without[2]


def test_a_correction_multiplies_the_objective_alone() -> None:
    """The factor of a token is min(exp(old - rollout), 1.5); KL and entropy stay as they are."""
    rows = batch()
    bare = replace(FULL, correction=None, kl_coef=0.0, entropy_coef=0.0)
    added = apply(replace(FULL, correction=None), rows)[0] - apply(bare, rows)[0]
    factors = (rows.ragged("old_logprobs").flat - rows.ragged("rollout_logprobs").flat).exp().clamp(max=1.5)
    objective_BT, _ = bare(seen(bare, rows, rows.ragged("now").flat))
    [micro] = training_micro_batches(rows, bare, budget_tokens=1000)
    by_slot = torch.zeros(3, 6, dtype=torch.float64)
    by_slot[micro.rows_B] = objective_BT
    corrected = float((by_slot.flatten() * factors * weights()).sum())
    total, _, metrics = apply(FULL, rows)
    assert total == pytest.approx(corrected + added, rel=1e-10)
    mask = torch.tensor(MASK).flatten().bool()
    ratios = (rows.ragged("old_logprobs").flat - rows.ragged("rollout_logprobs").flat).exp()[mask]
    assert metrics["correction/ratio_mean"].value == pytest.approx(float(ratios.mean()), rel=1e-10)
    assert metrics["correction/ratio_max"].value == pytest.approx(float(ratios.max()), rel=1e-10)
    assert metrics["correction/cut_share"].value == pytest.approx(float((ratios > 1.5).double().mean()), rel=1e-10)
    kept = ratios.clamp(max=1.5)
    effective = float(kept.sum() ** 2 / (kept**2).sum())
    assert metrics["correction/effective_samples"].value == pytest.approx(effective, rel=1e-10)


def test_the_policy_metrics() -> None:
    rows, mask = batch(), torch.tensor(MASK).flatten().bool()
    _, _, metrics = apply(FULL, rows)
    now, old, rollout = (rows.ragged(name).flat[mask] for name in ("now", "old_logprobs", "rollout_logprobs"))
    assert metrics["actor/ppo_kl"].value == pytest.approx(float((old - now).mean()), rel=1e-10)
    assert metrics["actor/ratio_max"].value == pytest.approx(float((now - old).exp().max()), rel=1e-10)
    assert metrics["actor/entropy"].value == pytest.approx(float(rows.ragged("entropies").flat[mask].mean()), rel=1e-10)
    assert metrics["rollout/logratio_max"].value == pytest.approx(float((now - rollout).abs().max()), rel=1e-10)
    assert metrics["rollout/logratio_mean"].value == pytest.approx(float((now - rollout).mean()), rel=1e-10)


@pytest.mark.parametrize("loss", ALL_LOSSES, ids=repr)
def test_every_metric_can_move(loss: Loss) -> None:
    """Over forty random batches no metric that a loss reports stays where it is."""
    found = [apply(loss, batch(seed))[2] for seed in range(40)]
    assert all(metrics.keys() == found[0].keys() for metrics in found)
    still = [name for name in found[0] if len({metrics[name].value for metrics in found}) == 1]
    assert still == [] and found[0]


def test_what_could_not_move_is_not_reported() -> None:
    """Against itself a policy has ratio 1; an objective without a clip clips nothing."""
    detached = apply(replace(FULL, old_column=None, correction=None), batch())[2]
    assert not {"actor/ppo_kl", "actor/ratio_max", "actor/pg_clipfrac"} & set(detached)
    for objective in (LogProbability(), SoftGate(1.0, 1.05)):
        metrics = apply(replace(FULL, objective=objective), batch())[2]
        assert "actor/pg_clipfrac" not in metrics and "actor/ppo_kl" in metrics
    assert "critic/vf_clipfrac" not in apply(ValueLoss(None), batch())[2]


def test_the_value_loss_by_hand() -> None:
    """0.5 max((V - R)^2, (clip(V, V_old +- 0.2) - R)^2), at the trainable slots of row 0 alone."""
    now = torch.zeros(18, dtype=torch.float64)
    old, returns = now.clone(), now.clone()
    now[2:6] = torch.tensor([0.5, 0.1, -0.5, 1.0], dtype=torch.float64)
    old[2:6] = torch.tensor([0.0, 0.0, 0.0, 0.9], dtype=torch.float64)
    returns[2:6] = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    rows = batch(values=old, returns=returns)
    # clipped V: 0.2, 0.1, -0.2, 1.0 -> errors 0.8, 0.9, 1.2, 0; plain 0.5, 0.9, 1.5, 0
    total, _, metrics = apply(ValueLoss(0.2, "cost_"), _renamed(rows), now)
    assert total == pytest.approx(0.1 * 0.5 * (0.64 + 0.81 + 2.25 + 0.0), rel=1e-12)
    assert metrics["cost_critic/vf_loss"].value == pytest.approx(0.5 * 3.7 / 9, rel=1e-12)
    assert metrics["cost_critic/vf_clipfrac"].value == pytest.approx(1 / 9)
    assert metrics["cost_critic/vpred_mean"].value == pytest.approx(1.1 / 9)
    assert set(metrics) == {f"cost_critic/{name}" for name in ("vf_loss", "vf_clipfrac", "vpred_mean")}


def _renamed(rows: Batch) -> Batch:
    return rows.union({"cost_values": rows["values"], "cost_returns": rows["returns"]})


def test_a_token_level_advantage_and_one_of_the_row_are_the_same_loss() -> None:
    rows = batch()
    spread = torch.tensor([1.5, -0.5, 0.25], dtype=torch.float64).repeat_interleave(6)
    tokens = rows.union({"advantages": Ragged(spread, torch.tensor(LENGTHS))})
    for objective in OBJECTIVES:
        loss = replace(FULL, objective=objective)
        assert apply(loss, tokens)[0] == apply(loss, rows)[0]
