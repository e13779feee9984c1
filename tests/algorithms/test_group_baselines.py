"""Critic-free algorithms: their advantages against plain loops, and what they send to the actor.

One batch for all: shuffled groups of different sizes, one whose scores are all equal, samples that were not judged,
had no token, or are left alone in their group by that.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripted_roles import CONTEXT, Scripted, samples

from algorithms.awr import AWR
from algorithms.cispo import CISPO
from algorithms.correcting import CorrectionSettings, rejection_metrics
from algorithms.dapo import DAPO
from algorithms.dr_grpo import DrGRPO
from algorithms.functional.aggregation import row_weights
from algorithms.gmpo import GMPO
from algorithms.gpg import GPG
from algorithms.grpo import GRPO
from algorithms.gspo import GSPO
from algorithms.objectives import (
    AdvantageWeighted,
    ClippedRatio,
    ClippedWeight,
    GeometricMeanRatio,
    LogProbability,
    SequenceRatio,
    SoftGate,
    TruncatedWeight,
)
from algorithms.opo import OPO
from algorithms.policy import PolicyGradient
from algorithms.reinforce_pp_baseline import ReinforcePPBaseline
from algorithms.rloo import RLOO
from algorithms.sapo import SAPO
from algorithms.scale_rl import ScaleRL
from hybridflow.batch import Batch

Group = list[tuple[float, int]]
"""(score, trainable tokens) of a group's samples."""

GROUPS = [7, 3, 5, 7, 3, 9, 5, 7, 9, 3, 5, 7]
SCORES = [1.0, 0.0, 2.0, 0.0, 1.0, 1.0, 0.5, 3.0, 1.0, 0.0, 9.0, 0.25]
LENGTHS = [3, 1, 2, 4, 2, 2, 1, 5, 3, 0, 4, 1]
NOT_JUDGED = (3, 10)
COUNTED = [0, 1, 2, 4, 5, 6, 7, 8, 11]
"""Row 9 has no token. Groups: 7 has rows 0, 7, 11; 3 has 1, 4; 5 has 2, 6; 9 has 5, 8, of equal scores."""
ALONE = [*COUNTED, 12]
"""Row 12 is judged, but the other sample of its group is not."""


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def centred(group: Group) -> list[float]:
    scores = [score for score, _ in group]
    return [score - mean(scores) for score in scores]


def grpo(group: Group) -> list[float]:
    spread = statistics.stdev(score for score, _ in group)
    return [value / (spread + 1e-6) for value in centred(group)]


def rloo(group: Group) -> list[float]:
    scores = [score for score, _ in group]
    return [score - mean(scores[:i] + scores[i + 1 :]) for i, score in enumerate(scores)]


def opo(group: Group) -> list[float]:
    baseline = math.fsum(score * length for score, length in group) / math.fsum(length for _, length in group)
    return [0.0 if len({s for s, _ in group}) == 1 else score - baseline for score, _ in group]


def each(one: Callable[[Group], list[float]]) -> Callable[[list[Group]], list[list[float]]]:
    return lambda groups: [one(group) for group in groups]


def gpg(groups: list[Group]) -> list[list[float]]:
    signal = sum(len(group) for group in groups if len({score for score, _ in group}) > 1)
    alpha = sum(map(len, groups)) / signal
    return [[alpha * value for value in centred(group)] for group in groups]


def batch_std(groups: list[Group]) -> list[list[float]]:
    spread = statistics.stdev(value for group in groups for value in centred(group))
    return [[value / (spread + 1e-6) for value in centred(group)] for group in groups]


def whitened_tokens(groups: list[Group]) -> list[list[float]]:
    tokens = [v for group in groups for v, (_, n) in zip(centred(group), group, strict=True) for _ in range(n)]
    middle, spread = mean(tokens), statistics.variance(tokens)
    return [[(value - middle) / math.sqrt(spread + 1e-8) for value in centred(group)] for group in groups]


CASES: dict[type[PolicyGradient], Callable[[list[Group]], list[list[float]]]] = {
    GRPO: each(grpo), DAPO: each(grpo), CISPO: each(grpo), GSPO: each(grpo), GMPO: each(grpo), SAPO: each(grpo),
    DrGRPO: each(centred), AWR: each(centred), RLOO: each(rloo), OPO: each(opo), GPG: gpg, ScaleRL: batch_std,
}  # fmt: skip


def batch(order: Sequence[int] | None = None, **changed_scores: Any) -> Batch:
    scores = [*SCORES, 4.0, 5.0]
    for row, score in changed_scores.items():
        scores[int(row.removeprefix("row"))] = score
    masks = [[1] * n for n in [*LENGTHS, 2, 2]]
    logprobs = [[-0.5 - 0.25 * t for t in range(len(mask))] for mask in masks]
    made = samples(
        scores, [*GROUPS, 4, 4], masks, abstained=[*NOT_JUDGED, 13],
        given={"given_old_logprobs": logprobs, "given_ref_logprobs": logprobs, "rollout_logprobs": logprobs},
    )  # fmt: skip
    return made if order is None else made.take(list(order))


def expected(kind: type[PolicyGradient]) -> dict[int, float]:
    """Advantage by row."""
    ids = sorted({GROUPS[row] for row in COUNTED})
    rows = [[row for row in COUNTED if GROUPS[row] == group] for group in ids]
    values = CASES[kind]([[(SCORES[row], LENGTHS[row]) for row in members] for members in rows])
    return {row: v for members, own in zip(rows, values, strict=True) for row, v in zip(members, own, strict=True)}


def build(kind: type[Any], **fields: Any) -> Any:
    return kind(kind.Config(**fields), CONTEXT)


def actor_and_reference(folder: Path) -> Scripted:
    return Scripted(folder, models=("actor", "reference"))


@pytest.mark.parametrize("kind", list(CASES), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("seed", [None, 1])
def test_advantages_are_those_of_a_plain_loop(kind: type[PolicyGradient], seed: int | None, tmp_path: Path) -> None:
    run = actor_and_reference(tmp_path)
    order = None if seed is None else np.random.default_rng(seed).permutation(14).tolist()
    rows = build(kind).experience(run.put(batch(order)), run.roles)
    found = dict(zip(rows.scalar("row").tolist(), rows.scalar("advantages").tolist(), strict=True))
    assert found == pytest.approx(expected(kind), rel=1e-12, abs=1e-12)
    assert rows.scalar("advantages").dtype == np.float64
    assert [v for row, v in found.items() if GROUPS[row] == 9] == [0.0, 0.0]  # equal scores: exactly 0


@pytest.mark.parametrize("kind", list(CASES), ids=lambda kind: kind.__name__)
def test_rows_outside_the_loss_move_no_advantage(kind: type[PolicyGradient], tmp_path: Path) -> None:
    """The score of a row without a token, and of one that is left alone, are changed."""
    run = actor_and_reference(tmp_path)
    rows = build(kind).experience(run.put(batch(row9=77.0, row12=-50.0)), run.roles)
    assert dict(zip(rows.scalar("row").tolist(), rows.scalar("advantages").tolist(), strict=True)) == pytest.approx(
        expected(kind), rel=1e-12, abs=1e-12
    )


def test_reinforce_pp_baseline_whitens_over_the_tokens_of_the_step(tmp_path: Path) -> None:
    run = actor_and_reference(tmp_path)
    rows = build(ReinforcePPBaseline).experience(run.put(batch()), run.roles)
    ids = sorted({GROUPS[row] for row in COUNTED})
    members = [[row for row in COUNTED if GROUPS[row] == group] for group in ids]
    values = whitened_tokens([[(SCORES[row], LENGTHS[row]) for row in own] for own in members])
    wanted = {row: v for own, vs in zip(members, values, strict=True) for row, v in zip(own, vs, strict=True)}
    found = run.token_rows(rows, "advantages")
    for row, tokens in zip(sorted(wanted), found, strict=True):
        assert tokens == pytest.approx([wanted[row]] * LENGTHS[row], rel=1e-6), row
    whole = [value for tokens in found for value in tokens]
    assert mean(whole) == pytest.approx(0, abs=1e-6) and statistics.variance(whole) == pytest.approx(1, rel=1e-5)


OBJECTIVES = {
    GRPO: ClippedRatio(0.2, 0.2), DAPO: ClippedRatio(0.2, 0.28), DrGRPO: ClippedRatio(0.2, 0.2),
    CISPO: ClippedWeight(1.0, 4.0), GSPO: SequenceRatio(3e-4, 4e-4), GMPO: GeometricMeanRatio(0.4, 0.4),
    SAPO: SoftGate(1.0, 1.05), AWR: AdvantageWeighted(0.5, 20.0), RLOO: LogProbability(), OPO: LogProbability(),
    GPG: LogProbability(), ScaleRL: TruncatedWeight(5.0), ReinforcePPBaseline: ClippedRatio(0.2, 0.2),
}  # fmt: skip
MODES = {
    GRPO: "sequence_mean_token_mean", DAPO: "token_mean", DrGRPO: "constant", CISPO: "token_mean",
    GSPO: "sequence_mean_token_mean", GMPO: "sequence_mean_token_mean", SAPO: "sequence_mean_token_mean",
    AWR: "token_mean", RLOO: "sequence_mean_token_sum", OPO: "token_mean", GPG: "token_mean", ScaleRL: "prompt_mean",
    ReinforcePPBaseline: "token_mean",
}  # fmt: skip


@pytest.mark.parametrize("kind", list(OBJECTIVES), ids=lambda kind: kind.__name__)
def test_the_actor_gets_the_objective_and_the_weights_of_the_paper(kind: type[PolicyGradient], tmp_path: Path) -> None:
    run = actor_and_reference(tmp_path)
    algorithm = build(kind)
    metrics = algorithm.update(algorithm.experience(run.put(batch()), run.roles), run.roles, step=0)
    [[(sent, loss)]] = run.worker("actor").updates
    assert (loss.objective, loss.temperature) == (OBJECTIVES[kind], CONTEXT.temperature)
    lengths, groups = sent.ragged("response_mask").padded().sum(1), sent.tensor("group")
    weights = row_weights(MODES[kind], lengths, groups, CONTEXT.max_response_tokens)  # type: ignore[arg-type]
    assert sent.tensor("loss_weight").tolist() == pytest.approx(weights.tolist(), rel=1e-15)
    assert metrics["group/zero_variance_share"].value == pytest.approx(1 / 4)
    assert run.worker("reference").columns == (["ref_logprobs"] if kind is ReinforcePPBaseline else [])


@pytest.mark.parametrize(
    ("source", "column", "asked"),
    [("recompute", "old_logprobs", ["old_logprobs"]), ("rollout", "rollout_logprobs", []), ("detach", None, [])],
)
def test_where_old_logprobs_come_from(source: str, column: str | None, asked: list[str], tmp_path: Path) -> None:
    run = actor_and_reference(tmp_path)
    algorithm = build(GRPO, old_logprobs=source)
    algorithm.update(algorithm.experience(run.put(batch()), run.roles), run.roles, step=0)
    [[(_, loss)]] = run.worker("actor").updates
    assert loss.old_column == column
    assert run.worker("actor").columns == asked


def test_a_rejected_row_leaves_before_the_baseline(tmp_path: Path) -> None:
    """Row 7, of group 7, was drawn 0.5 nats a token away from the policy; rows 0 and 11 remain."""
    run, made = actor_and_reference(tmp_path), batch()
    made.ragged("rollout_logprobs").rows()[7].add_(0.5)
    rejection = {"estimator": "k1", "over": "mean", "bound": 0.4}
    algorithm = build(GRPO, old_logprobs="recompute", rejection=rejection)
    rows = algorithm.experience(run.put(made), run.roles)
    found = dict(zip(rows.scalar("row").tolist(), rows.scalar("advantages").tolist(), strict=True))
    assert set(found) == set(COUNTED) - {7}
    wanted = grpo([(SCORES[0], 3), (SCORES[11], 1)])
    assert [found[0], found[11]] == pytest.approx(wanted, rel=1e-12)
    metrics = algorithm.update(rows, run.roles, step=0)
    assert metrics["correction/rejected_share"].value == pytest.approx(1 / len(ALONE))
    assert metrics["correction/row_ratio_max"].value >= metrics["correction/row_ratio_mean"].value > 0


def test_a_batch_in_which_nothing_is_left_takes_no_optimizer_step(tmp_path: Path) -> None:
    run = actor_and_reference(tmp_path)
    for kind in (*CASES, ReinforcePPBaseline):
        algorithm = build(kind)
        experience = algorithm.experience(run.put(batch().take([3, 9, 10, 13])), run.roles)
        assert experience.num_rows == 0
        assert algorithm.update(experience, run.roles, step=0) == {}
    assert run.worker("actor").updates == []


@pytest.mark.parametrize("kind", list(OBJECTIVES), ids=lambda kind: kind.__name__)
def test_one_sample_a_prompt_is_refused(kind: type[PolicyGradient]) -> None:
    [line] = kind.problems(kind.Config(samples_per_prompt=1))
    assert line.startswith("samples_per_prompt: 1 sample has no group baseline")


@pytest.mark.parametrize("kind", [GSPO, GMPO])
def test_one_number_a_sequence_takes_one_factor_a_sequence(kind: Any) -> None:
    """A factor a token would be averaged over the row: neither paper's correction."""
    by_token = kind.Config(correction=CorrectionSettings(level="token"))
    [line] = kind.problems(by_token)
    assert line.startswith("correction.level: found token; the objective is one number a sequence")
    assert kind.problems(kind.Config(correction=CorrectionSettings(level="geometric"))) == []


@pytest.mark.parametrize(
    ("fields", "text"),
    [({"kind": "tis", "low": 0.1}, "low: kind=tis"), ({"kind": "icepop", "cap": 3.0}, "cap: kind=icepop")],
)
def test_bounds_that_a_correction_does_not_read(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        CorrectionSettings(**fields)


def test_an_estimator_without_a_coefficient_is_not_read() -> None:
    assert GRPO.Config(kl_estimator="k2").unread() == {"kl_estimator": "kl_loss_coef"}
    assert GRPO.Config(kl_estimator="k2", kl_loss_coef=0.1).unread() == {}


def test_what_a_rejection_says_of_the_rows_it_saw() -> None:
    found = rejection_metrics(torch.tensor([True, False, True, True]), torch.tensor([1.0, 0.4, 1.2, 1.0]).double())
    assert {name: metric.value for name, metric in found.items()} == pytest.approx(
        {"correction/rejected_share": 0.25, "correction/row_ratio_mean": 0.9, "correction/row_ratio_max": 1.2}
    )
