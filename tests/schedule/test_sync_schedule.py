"""The synchronous schedule: request order, seeds, and what an algorithm may refuse."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hybridflow.algorithm import Algorithm, AlgorithmContext, Verdict, expand, scored_by
from hybridflow.batch import Batch, Ragged
from hybridflow.batch_ref import BatchRef
from hybridflow.controller.local_runtime import LocalStore
from hybridflow.errors import HybridFlowError, RewardError
from hybridflow.metrics import Metrics
from hybridflow.roles import Roles
from hybridflow.schedule.phases import Phases, PhaseSettings
from hybridflow.schedule.sync import SyncSchedule, SyncSettings


class Done:
    def __init__(self, value: Any) -> None:
        self.value = value

    def result(self) -> Any:
        return self.value


class FakeRollout:
    def __init__(self) -> None:
        self.requests: list[BatchRef] = []

    def generate(self, requests: BatchRef, sampling: str) -> Done:
        self.requests.append(requests)
        count = requests.num_rows
        numbers = {"prompt_length": 2, "response_length": 1, "num_tokens": 3, "truncated": False}
        scalars = {name: np.full(count, value) for name, value in numbers.items()}
        return Done(BatchRef(count, {}, scalars))


class FakePolicy:
    version = 0

    def sync(self, loaded: Any = None) -> Metrics:
        self.version += 1
        return {}


class Prompts:
    position = 0

    def next(self, count: int) -> Batch:
        start, self.position = self.position, self.position + count
        return Batch(
            {
                "prompt_tokens": Ragged.from_rows([[1, 2]] * count, torch.int64),
                "position": torch.arange(start, start + count),
                "epoch": torch.zeros(count, dtype=torch.int64),
            }
        )

    def validation(self, count: int) -> Batch:
        return Prompts().next(count)


class Two(Algorithm):
    """Two samples a prompt; the reward is the prompt's position; refuses groups below `floor`, skips `skipped`."""

    floor = 0
    refusal: Verdict = "drop"
    draws = 1
    skipped = ()

    @classmethod
    def max_draws(cls, config: Any) -> int:
        return cls.draws

    def requests(self, prompts: BatchRef) -> BatchRef:
        return expand(prompts.take(np.flatnonzero(~np.isin(prompts.scalar("position"), self.skipped))), 2)

    def score(self, rollouts: BatchRef, roles: Roles) -> BatchRef:
        return rollouts.with_scalars(
            rewards=rollouts.scalar("position").astype(np.float32), abstained=np.zeros(rollouts.num_rows, dtype=bool)
        )

    def accept(self, group: BatchRef) -> Verdict:
        return self.refusal if group.scalar("rewards")[0] < self.floor else "keep"

    def experience(self, rollouts: BatchRef, roles: Roles) -> BatchRef:
        self.kept = rollouts
        return rollouts

    def update(self, experience: BatchRef, roles: Roles, step: int) -> Metrics:
        return {}


class Refilling(Two):
    refusal: Verdict = "refill"
    draws = 2


def schedule(floor: int, kind: type[Two] = Two) -> tuple[SyncSchedule, Two, FakeRollout]:
    algorithm, rollout = kind(None, AlgorithmContext(0, 1.0, 8)), FakeRollout()
    algorithm.floor = floor
    roles = Roles({"rollout": rollout})
    settings = SyncSettings(prompts_per_step=3, seed=5, max_empty_steps=2)
    phases = Phases(FakePolicy(), rollout, {}, PhaseSettings())
    return SyncSchedule(algorithm, roles, Prompts(), LocalStore(), phases, settings), algorithm, rollout


def test_dropped_groups_leave_in_request_order() -> None:
    made, algorithm, _ = schedule(floor=1)
    result = made.step(0)
    assert algorithm.kept.scalar("position").tolist() == [1, 1, 2, 2]
    assert result.samples is not None and result.samples.num_rows == 6
    assert result.num_tokens == 18


def test_refills_draw_just_what_is_missing_in_data_order() -> None:
    made, algorithm, rollout = schedule(floor=2, kind=Refilling)
    result = made.step(0)
    assert [request.num_rows for request in rollout.requests] == [6, 4]
    assert algorithm.kept.scalar("position").tolist() == [2, 2, 3, 3, 4, 4]
    assert algorithm.kept.scalar("group").tolist() == [2, 2, 3, 3, 4, 4]
    assert result.samples is not None and len(set(result.samples.scalar("seed").tolist())) == 10
    assert (result.metrics["group/accepted"].value, result.metrics["group/rejected"].value) == (3, 2)
    made.step(1)
    assert algorithm.kept.scalar("position").tolist() == [5, 5, 6, 6, 7, 7]


def test_refills_have_a_bound_and_then_the_step_is_smaller() -> None:
    made, algorithm, rollout = schedule(floor=4, kind=Refilling)
    made.step(0)
    assert algorithm.kept.scalar("position").tolist() == [4, 4, 5, 5]
    assert len(rollout.requests) == 2


def test_prompts_that_the_algorithm_skips_are_replaced() -> None:
    made, algorithm, _ = schedule(floor=0, kind=Refilling)
    algorithm.skipped = (0, 1, 2)
    assert made.step(0).metrics["group/skipped_prompts"].value == 3
    assert algorithm.kept.scalar("position").tolist() == [3, 3, 4, 4, 5, 5]


def test_a_step_whose_prompts_are_all_skipped_says_so(caplog: pytest.LogCaptureFixture) -> None:
    made, algorithm, rollout = schedule(floor=0, kind=Refilling)
    algorithm.skipped = tuple(range(100))
    result = made.step(0)
    assert (result.samples, result.num_tokens, rollout.requests) == (None, 0, [])
    assert result.metrics["group/skipped_prompts"].value == 6
    assert "took no group: no prompt was sampled, the algorithm skipped them all" in caplog.text
    with pytest.raises(HybridFlowError, match="2 steps in a row"):
        made.step(1)


def test_steps_without_a_group_are_diagnosed_and_then_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    made, _, _ = schedule(floor=99)
    result = made.step(0)
    assert result.metrics["group/accepted"].value == 0
    assert made.policy.version == 0  # no weight changed
    assert "took no group: of 3 groups 3 had one score" in caplog.text
    resumed, _, _ = schedule(floor=99)
    resumed.empty_steps = made.empty_steps
    with pytest.raises(HybridFlowError, match=r"(?s)2 steps in a row \(schedule.max_empty_steps\): the run stops"):
        resumed.step(1)


class Emptying(Two):
    """Takes every group, and leaves no row of them."""

    def experience(self, rollouts: BatchRef, roles: Roles) -> BatchRef:
        return rollouts.take([])

    def update(self, experience: BatchRef, roles: Roles, step: int) -> Metrics:
        raise AssertionError("there is nothing to update on")


def test_groups_that_leave_no_row_change_no_weight_and_then_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    made, _, _ = schedule(floor=0, kind=Emptying)
    assert made.step(0).metrics["group/accepted"].value == 3
    assert (made.policy.version, made.empty_steps) == (0, 1)
    assert "Emptying took 6 samples and left none of them to learn from: 0 have no score, 0 no response" in caplog.text
    with pytest.raises(HybridFlowError, match="2 steps in a row"):
        made.step(1)


def scores(rewards: list[float], abstained: list[bool]) -> Done:
    answer = {"rewards": torch.tensor(rewards), "abstained": torch.tensor(abstained)}
    return Done(BatchRef.put(Batch(answer | {"failed": torch.tensor(abstained), "failure": [""] * 2}), LocalStore()))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_named_unless_the_sample_was_declined(wrong: float) -> None:
    rollouts = BatchRef(2, {}, {"sample": np.arange(2)})
    bad, good = scores([1.0, wrong], [False, False]), scores([1.0, 0.5], [False, False])
    with pytest.raises(RewardError, match=r"rewards: found (nan|inf) for sample 1 \(1 of 2 samples\); expected finite"):
        scored_by(rollouts, bad)
    with pytest.raises(RewardError, match="costs: found"):
        scored_by(rollouts, good, costs=bad)
    reward = type("Reward", (), {"score": lambda self, rows: bad})()
    with pytest.raises(RewardError, match="rewards: found"):
        Algorithm.score(Two(None, AlgorithmContext(0, 1.0, 8)), rollouts, Roles({"reward": reward}))
    declined = scored_by(rollouts, scores([1.0, wrong], [False, True]), costs=good)
    assert declined.scalar("abstained").tolist() == [False, True]


def test_every_sample_has_a_seed_of_its_own_and_groups_are_atoms() -> None:
    made, _, rollout = schedule(floor=0)
    made.step(0)
    requests = rollout.requests[0]
    assert len(set(requests.scalar("seed").tolist())) == 6
    assert requests.scalar("atom").tolist() == requests.scalar("group").tolist() == [0, 0, 1, 1, 2, 2]
    again, _, other = schedule(floor=0)
    again.step(9)  # the step at which a prompt arrives is no part of its seeds
    assert other.requests[0].scalar("seed").tolist() == requests.scalar("seed").tolist()


class Failing(Refilling):
    """The reward fails on the samples of these positions."""

    failing: tuple[int, ...] = ()

    def score(self, rollouts: BatchRef, roles: Roles) -> BatchRef:
        positions = rollouts.scalar("position").tolist()
        failed = torch.tensor([position in self.failing for position in positions], dtype=torch.bool)
        texts = [f"KeyError at {position}" if position in self.failing else "" for position in positions]
        answer = Batch({"abstained": failed, "failed": failed, "failure": texts})
        return super().score(rollouts, roles).union(BatchRef.put(answer, LocalStore()))


def test_failed_rewards_are_counted_over_the_whole_step() -> None:
    """Position 3 comes alone in a round of refills: both samples of that round failed, two of the step's eight."""
    made, algorithm, _ = schedule(floor=1, kind=Failing)
    made.settings = replace(made.settings, max_failure_share=0.25)
    algorithm.failing = (3,)
    result = made.step(0)
    assert result.samples is not None and result.samples.num_rows == 8
    assert (result.metrics["reward/failed"].value, result.metrics["reward/abstained"].value) == (2, 2)


def test_too_many_failed_rewards_end_the_step_with_the_first_traceback() -> None:
    made, algorithm, _ = schedule(floor=0, kind=Failing)
    algorithm.failing = (1, 2)
    with pytest.raises(RewardError, match=r"(?s)4 of 6 samples.*max_failure_share=0\.05 .*KeyError at 1"):
        made.step(0)
    assert made.policy.version == 0
    with pytest.raises(RewardError, match=r"2 of \d+ samples"):
        made.validate(3)


class Abstaining(Two):
    """The reward declines to judge these positions."""

    declined: tuple[int, ...] = ()

    def score(self, rollouts: BatchRef, roles: Roles) -> BatchRef:
        return (
            super().score(rollouts, roles).with_scalars(abstained=np.isin(rollouts.scalar("position"), self.declined))
        )


def test_validation_counts_the_judged_and_hands_out_all_its_samples() -> None:
    """Rewards are the positions, 0 to 3: of 1, 2 and 3, which are judged, all are right."""
    made, algorithm, _ = schedule(floor=0, kind=Abstaining)
    algorithm.declined = (0,)
    result = made.validate(4)
    assert result.samples is not None
    assert result.samples.scalar("position").tolist() == [0, 1, 2, 3]
    assert result.samples.scalar("sample").tolist() == [0, 0, 0, 0]
    assert {name: metric.value for name, metric in result.metrics.items()} == {
        "val/accuracy": 1.0, "val/reward_mean": 2.0, "val/abstained": 1.0, "val/response_length": 1.0,
    }  # fmt: skip
    algorithm.declined = (0, 1, 2, 3)
    none_judged = made.validate(4).metrics
    assert none_judged["val/abstained"].value == 4
    assert "val/accuracy" not in none_judged and "val/reward_mean" not in none_judged
