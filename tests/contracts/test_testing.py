"""The contract tests themselves: each finds what it is there to find, and says so."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from algorithms.grpo import GRPO
from algorithms.losses import PolicyLoss, SupervisedLoss, mean_over, per_token
from algorithms.objectives import ClippedRatio
from algorithms.policy import PolicyGradient
from hybridflow.algorithm import joined
from hybridflow.batch import Batch, Ragged
from hybridflow.batch_ref import BatchRef
from hybridflow.loss import Atom, LossInputs, Output
from hybridflow.metrics import Metric, Metrics
from hybridflow.rewards.functions import ABSTAIN, batched
from hybridflow.roles import Roles
from hybridflow.testing import ContractViolation, check_algorithm, check_loss, check_partition, check_reward

FEW = {"samples_per_prompt": 3}


@dataclass(frozen=True)
class Sound:
    """-advantage * logprob, as everything below it is but for one fault."""

    temperature: float = 1.0
    outputs: tuple[Output, ...] = ("logprobs",)
    columns: tuple[str, ...] = ("advantages",)
    atom: Atom = "row"

    def value(self, inputs: LossInputs) -> Tensor:
        return -per_token(inputs.columns["advantages"], inputs.mask_BT) * inputs.outputs["logprobs"]

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        loss_BT = self.value(inputs)
        return loss_BT, {"mine/loss": mean_over(loss_BT, inputs.mask_BT)}


class DividesByItsMicroBatch(Sound):
    def value(self, inputs: LossInputs) -> Tensor:
        return super().value(inputs) / inputs.mask_BT.sum()


class CentresOnItsMicroBatch(Sound):
    def value(self, inputs: LossInputs) -> Tensor:
        advantages_BT = inputs.columns["advantages"]
        return -(advantages_BT - advantages_BT[inputs.mask_BT].mean()) * inputs.outputs["logprobs"]


class ReadsMaskedSlots(Sound):
    def value(self, inputs: LossInputs) -> Tensor:
        return super().value(inputs) + inputs.columns["advantages"].sum(1, keepdim=True)


class AveragesOverSlots(Sound):
    def value(self, inputs: LossInputs) -> Tensor:
        return super().value(inputs) * inputs.mask_BT.double().mean(1, keepdim=True)


class OneNumber(Sound):
    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        return super().value(inputs).sum(), {}


class NoGradient(Sound):
    def value(self, inputs: LossInputs) -> Tensor:
        return super().value(inputs).detach() + 0 * inputs.outputs["logprobs"]


class InfiniteGradient(Sound):
    def value(self, inputs: LossInputs) -> Tensor:
        logprobs_BT = inputs.outputs["logprobs"]
        return (logprobs_BT - logprobs_BT.detach()).abs().sqrt()


class MetricOfMaskedSlots(Sound):
    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        return super().value(inputs), {"mine/logprob": Metric(float(inputs.outputs["logprobs"].detach().sum()))}


class MetricIsNoMetric(Sound):
    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        return super().value(inputs), {"mine/one": 1.0}  # type: ignore[dict-item]


class SplitPair(Sound):
    """Rows of a pair share a loss, and nothing says that they belong together."""

    def value(self, inputs: LossInputs) -> Tensor:
        totals_B = inputs.outputs["logprobs"].where(inputs.mask_BT, 0).sum(1)
        return super().value(inputs) + (totals_B - totals_B.flip(0))[:, None]


@dataclass(frozen=True)
class HoldsAFunction(Sound):
    function: Callable[[Tensor], Tensor] = lambda tensor: tensor


@dataclass(frozen=True)
class UnknownColumn(Sound):
    columns: tuple[str, ...] = ("advantages", "nobodys")


@pytest.mark.parametrize("loss", [Sound(), SupervisedLoss(), PolicyLoss(0.8, ClippedRatio(0.2, 0.28))], ids=repr)
def test_sound_losses_pass(loss: Any) -> None:
    check_loss(loss)
    check_partition(loss)


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (DividesByItsMicroBatch(), "the loss of row 0 alone is not what it is among others"),
        (CentresOnItsMicroBatch(), "the loss of row 0 alone is not what it is among others"),
        (SplitPair(), "the loss of row 0 alone is not what it is among others"),
        (ReadsMaskedSlots(), "with NaN at masked slots"),
        (AveragesOverSlots(), "with 3 more slots: the loss: differs by"),
        (OneNumber(), r"gives shape \(\); one number a token is \(6, 9\)"),
        (NoGradient(), "no output has a gradient"),
        (InfiniteGradient(), "the gradient of logprobs is not finite"),
        (MetricOfMaskedSlots(), "with NaN at masked slots .* metric mine/logprob is nan"),
        (MetricIsNoMetric(), "mine/one is a float; a metric is a Metric"),
        (HoldsAFunction(), "does not pickle"),
        (UnknownColumn(), "column 'nobodys': no such column of numbers is registered"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Sound) else "",
)
def test_check_loss_finds(loss: Any, text: str) -> None:
    with pytest.raises(ContractViolation, match=text):
        check_loss(loss)


def test_a_loss_may_rely_on_zeros_at_masked_slots_where_it_says_so() -> None:
    check_loss(ReadsMaskedSlots(), reads_zeros=True)
    check_partition(ReadsMaskedSlots())


def test_a_column_of_ones_own() -> None:
    check_loss(UnknownColumn(), columns={"nobodys": lambda mask_BT, generator: torch.zeros(mask_BT.shape)})
    with pytest.raises(ContractViolation, match=r"column 'nobodys': made as \(6, 2\); 6 rows of 9 slots"):
        check_loss(UnknownColumn(), columns={"nobodys": lambda mask_BT, generator: torch.zeros(6, 2)})


@pytest.mark.parametrize("loss", [DividesByItsMicroBatch(), CentresOnItsMicroBatch(), AveragesOverSlots(), SplitPair()])
def test_check_partition_finds(loss: Any) -> None:
    with pytest.raises(ContractViolation, match="is not that of all rows at once"):
        check_partition(loss)


class OfARank(GRPO):
    """Its loss divides by what its micro-batch has."""

    class Config(GRPO.Config):
        def loss(self, temperature: float) -> Any:
            return DividesByItsMicroBatch(temperature)


@dataclass(frozen=True)
class LargestOfAMicroBatch(Sound):
    """Its gradient is sound; its metric is the mean over micro-batches of what each found."""

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        loss_BT, metrics = super().__call__(inputs)
        return loss_BT, metrics | {"mine/largest": Metric(float(loss_BT[inputs.mask_BT].max()))}


class MeasuresARank(GRPO):
    class Config(GRPO.Config):
        def loss(self, temperature: float) -> Any:
            return LargestOfAMicroBatch(temperature)


class Forgets(GRPO):
    """The learning depends on a count that no checkpoint keeps."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.steps_done = 0

    def update(self, experience: BatchRef, roles: Roles, step: int) -> Metrics:
        self.steps_done += 1
        scaled = experience.with_scalars(advantages=experience.scalar("advantages") * self.steps_done)
        return super().update(scaled, roles, step)


class KeepsATuple(Forgets):
    def state_dict(self) -> dict[str, Any]:
        return {"done": (self.steps_done,)}


class LoadsNothing(Forgets):
    def state_dict(self) -> dict[str, Any]:
        return {"done": self.steps_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class OfThePosition(GRPO):
    """A row's advantage depends on where it stands in the batch."""

    def advantages(self, rewards_B: Tensor, rows: BatchRef) -> Tensor:
        return super().advantages(rewards_B, rows) + torch.arange(len(rewards_B))


class CountsTheDeclined(PolicyGradient):
    """The baseline is made of all scores, also those that the reward declined to give."""

    Config = GRPO.Config

    def score(self, rollouts: BatchRef, roles: Roles) -> BatchRef:
        scored = super().score(rollouts, roles)
        return scored.with_scalars(baseline=np.full(scored.num_rows, scored.scalar("rewards").mean()))

    def advantages(self, rewards_B: Tensor, rows: BatchRef) -> Tensor:
        return rewards_B - torch.from_numpy(rows.scalar("baseline"))


@dataclass(frozen=True)
class MeanOfAllSlots:
    columns: tuple[str, ...] = ("response_mask", "rollout_logprobs")

    def __call__(self, batch: Batch) -> Batch:
        logprobs = batch.ragged("rollout_logprobs")
        means = [row.mean().expand(len(row)) for row in logprobs.rows()]
        return Batch({"advantages": Ragged(torch.cat(means), logprobs.lengths)})


class ReadsThePrompt(GRPO):
    def experience(self, rollouts: BatchRef, roles: Roles) -> BatchRef:
        rows = super().experience(rollouts, roles)
        return joined(rows.drop(["advantages"]), roles.actor.compute(MeanOfAllSlots(), rows))


class SendsAFunction(GRPO):
    def experience(self, rollouts: BatchRef, roles: Roles) -> BatchRef:
        rows = super().experience(rollouts, roles)
        return joined(rows, roles.actor.compute(lambda batch: Batch({"extra": batch.tensor("rewards")}), rows))


class LearnsNothing(GRPO):
    def advantages(self, rewards_B: Tensor, rows: BatchRef) -> Tensor:
        return torch.zeros_like(rewards_B)


class EndlessMetric(GRPO):
    def update(self, experience: BatchRef, roles: Roles, step: int) -> Metrics:
        return super().update(experience, roles, step) | {"mine/ratio": Metric(1.0, 0.0)}


class AsksAJudge(GRPO):
    @classmethod
    def required_roles(cls, config: Any) -> tuple[str, ...]:
        return (*super().required_roles(config), "judge")


@pytest.mark.parametrize(
    ("algorithm", "text"),
    [
        (OfARank, "OfARank: the gradient with 1 ranks, micro-batches of 1 rows is not that of all rows at once"),
        (
            MeasuresARank,
            "MeasuresARank with 1 ranks, micro-batches of 1 rows instead of all rows at once: metric mine/larg",
        ),
        (Forgets, "the step after a checkpoint is another one"),
        (KeepsATuple, "KeepsATuple.state_dict: JSON changes it"),
        (LoadsNothing, "LoadsNothing.load_state_dict: loads .* and then says"),
        (OfThePosition, "the gradient depends on the order of groups and rows"),
        (CountsTheDeclined, "with 2 ranks, micro-batches of 3 rows, NaN at masked slots"),
        (ReadsThePrompt, "with 2 ranks, micro-batches of 3 rows, NaN at masked slots"),
        (SendsAFunction, "an argument of actor.compute: .* does not pickle"),
        (LearnsNothing, "optimizer steps has a gradient; nothing would be learnt"),
        (EndlessMetric, "metric mine/ratio is nan"),
        (AsksAJudge, "calls a role 'judge'; say what plays it"),
    ],
)
def test_check_algorithm_finds(algorithm: Any, text: str) -> None:
    with pytest.raises((ContractViolation, ValueError), match=text):
        check_algorithm(algorithm, FEW)


def test_check_algorithm_takes_a_class_and_says_what_its_configuration_lacks() -> None:
    check_algorithm(AsksAJudge, FEW, workers={"judge": "reference"})
    with pytest.raises(ContractViolation, match=r"its own configuration does not hold: .*samples_per_prompt"):
        check_algorithm(GRPO, {"samples_per_prompt": 1})


def length(prompt: str, response: str, answer: str, **row: Any) -> float:
    return float(len(response))


def declines(prompt: str, response: str, answer: str, **row: Any) -> Any:
    return ABSTAIN if not response else 1.0


@batched
def all_lengths(prompts: list[str], responses: list[str], answers: list[str], rows: list[dict]) -> list[float]:
    return [float(len(response)) for response in responses]


@batched
def share(prompts: list[str], responses: list[str], answers: list[str], rows: list[dict]) -> list[float]:
    return [len(response) / max(1, sum(map(len, responses))) for response in responses]


def counts_calls(prompt: str, response: str, answer: str, calls: list = [], **row: Any) -> float:  # noqa: B006
    calls.append(1)
    return float(len(calls))


def edits(prompt: str, response: str, answer: str, note: dict, **row: Any) -> float:
    note["seen"] = True
    return 1.0


def samples() -> list[dict[str, Any]]:
    return [
        {"prompt": "1+1=", "response": "2", "answer": "2", "note": {}},
        {"prompt": "2+2=", "response": "five", "answer": "4", "note": {}},
    ]


def test_sound_rewards_pass() -> None:
    for function in (length, declines, all_lengths, "hybridflow.rewards.functions:arithmetic"):
        check_reward(function, samples())


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda **row: None, "returned None"),
        (lambda **row: float("nan"), "returned nan"),
        (lambda prompt, response, answer, **row: 1 / len(response), "(?s)on an empty response: .*ZeroDivisionError"),
        (counts_calls, "scores the same samples differently when asked again"),
        (share, "among others and 1.0 alone"),
        (edits, "changes the samples that it is given"),
        ("hybridflow.rewards.functions:arithmetics", "did you mean 'arithmetic'"),
    ],
)
def test_check_reward_finds(function: Any, text: str) -> None:
    with pytest.raises(ContractViolation, match=text):
        check_reward(function, samples())


def test_check_reward_says_what_a_sample_lacks() -> None:
    with pytest.raises(ContractViolation, match="a sample lacks answer; it has prompt, response"):
        check_reward(length, [{"prompt": "", "response": ""}])
