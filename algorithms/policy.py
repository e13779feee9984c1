"""What online policy-gradient algorithms share: settings, the columns that a loss reads, and the critic-free dataflow.

`PolicyGradient` is complete but for two things that a subclass says: how scores become advantages, and the objective.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from algorithms.correcting import CorrectionSettings, Rejection, RejectionSettings, rejection_metrics
from algorithms.functional import advantages
from algorithms.functional.aggregation import Mode
from algorithms.functional.kl import Estimator
from algorithms.losses import PolicyLoss
from algorithms.objectives import ClippedRatio, LogProbability, Objective
from algorithms.weighting import StepSettings, optimizer_steps, trainable
from hybridflow.algorithm import Algorithm, AlgorithmContext, joined
from hybridflow.batch_ref import BatchRef
from hybridflow.metrics import Metric, Metrics
from hybridflow.roles import Roles

OLD_COLUMNS = {"recompute": "old_logprobs", "rollout": "rollout_logprobs", "detach": None}


class PolicySettings(StepSettings):
    """What every online algorithm can be told.

    old_logprobs: of the policy before this update: recomputed by the actor, as the rollout engine gave them, or
    detached current ones (one strictly on-policy step, every ratio 1). correction, rejection: for samples that another
    policy drew than the one updated.
    """

    samples_per_prompt: int = Field(8, ge=1)
    old_logprobs: Literal["recompute", "rollout", "detach"] = "recompute"
    aggregation: Mode = "token_mean"
    entropy_coef: float = 0.0
    kl_loss_coef: float = Field(0.0, ge=0)
    kl_estimator: Estimator = "k3"
    correction: CorrectionSettings | None = None
    rejection: RejectionSettings | None = None

    @abstractmethod
    def objective(self) -> Objective:
        """What is maximised a token or sequence."""

    def loss(self, temperature: float) -> PolicyLoss:
        return PolicyLoss(
            temperature=temperature,
            objective=self.objective(),
            old_column=OLD_COLUMNS[self.old_logprobs],
            correction=self.correction,
            kl_coef=self.kl_loss_coef,
            kl_estimator=self.kl_estimator,
            entropy_coef=self.entropy_coef,
        )

    @property
    def sampled_column(self) -> str:
        """The log-probs that stand for the sampling policy."""
        return OLD_COLUMNS[self.old_logprobs] or "rollout_logprobs"

    def unread(self) -> Mapping[str, str]:
        estimator = self.changed("kl_estimator") if not self.kl_loss_coef else []
        return {**super().unread(), **dict.fromkeys(estimator, "kl_loss_coef")}

    def problems(self) -> list[str]:
        found = []
        if self.old_logprobs == "detach" and self.epochs * self.mini_batches > 1:
            steps = f"epochs={self.epochs}, mini_batches={self.mini_batches}"
            found.append(f"old_logprobs: detach makes every ratio 1, found {steps}; use recompute, or one step")
        if self.kl_loss_coef and self.kl_estimator == "k1":
            found.append("kl_estimator: the gradient of k1 as a loss has no reference in it; use k2 or k3")
        if self.correction and self.old_logprobs == "rollout":
            found.append("correction: old_logprobs=rollout makes its ratio 1; use recompute, or no correction")
        if self.rejection and self.old_logprobs != "recompute":
            found.append(f"rejection: compares old with rollout log-probs, found old_logprobs={self.old_logprobs}")
        return found


class ClipSettings(PolicySettings):
    """The clipped ratio of PPO (1707.06347)."""

    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.2, gt=0)
    dual_clip: float | None = Field(None, gt=1)

    def objective(self) -> Objective:
        return ClippedRatio(self.clip_low, self.clip_high, self.dual_clip)


class RatioSettings(ClipSettings):
    """For algorithms whose paper has no ratio. ratio: none is -A log p; clipped is PPO's, as many codes run them."""

    ratio: Literal["none", "clipped"] = "none"

    def objective(self) -> Objective:
        return LogProbability() if self.ratio == "none" else super().objective()

    def unread(self) -> Mapping[str, str]:
        clips = self.changed("clip_low", "clip_high", "dual_clip") if self.ratio == "none" else []
        return {**super().unread(), **dict.fromkeys(clips, "ratio=clipped")}


class SequenceSettings(PolicySettings):
    """For objectives that are one number a sequence: averaged over sequences, and corrected by one factor each."""

    aggregation: Literal["sequence_mean_token_mean"] = "sequence_mean_token_mean"  # type: ignore[assignment]

    def problems(self) -> list[str]:
        by_token = self.correction is not None and self.correction.level == "token"
        text = "correction.level: found token; the objective is one number a sequence: sequence, or geometric"
        return super().problems() + ([text] if by_token else [])


class OnlinePolicy(Algorithm):
    """Samples, and the log-probs that a policy loss reads."""

    class Config(PolicySettings):
        pass

    def __init__(self, config: Any, context: AlgorithmContext) -> None:
        super().__init__(config, context)
        self.rejected: Metrics = {}
        """Of the last batch of experience: what `rejection` did to the rows that it looked at."""

    @classmethod
    def required_roles(cls, config: Any) -> tuple[str, ...]:
        return ("actor", "rollout", "reward", *(("reference",) if cls.uses_reference(config) else ()))

    @classmethod
    def uses_reference(cls, config: Any) -> bool:
        """Only a coefficient above 0 brings a reference model into the run."""
        return bool(config.kl_loss_coef)

    @classmethod
    def samples_per_prompt(cls, config: Any) -> int:
        return config.samples_per_prompt

    @classmethod
    def sequences_per_update(cls, config: Any, prompts_per_step: int) -> int:
        return -(-prompts_per_step * config.samples_per_prompt // config.mini_batches)

    @classmethod
    def problems(cls, config: Any) -> list[str]:
        return config.problems()

    def with_logprobs(self, rollouts: BatchRef, roles: Roles, *others: Any) -> BatchRef:
        """Rows with a trainable, judged token, their old and reference log-probs, and the columns of `others`, which
        run side by side; without the rows that are rejected as too far from the policy."""
        rows, temperature = trainable(rollouts), self.context.temperature
        futures = [other(rows) for other in others]
        if self.config.old_logprobs == "recompute":
            futures.append(roles.actor.logprobs(rows, temperature=temperature, column="old_logprobs"))
        if self.uses_reference(self.config):
            futures.append(roles.reference.logprobs(rows, temperature=temperature, column="ref_logprobs"))
        return self._unrejected(joined(rows, *futures), roles)

    def _unrejected(self, rows: BatchRef, roles: Roles) -> BatchRef:
        """Before any baseline, so that a rejected row moves none."""
        if not self.config.rejection or not rows.num_rows:
            return rows
        judged = joined(rows, roles.actor.compute(Rejection(self.config.rejection, "old_logprobs"), rows))
        kept = judged.scalar("kept").astype(bool)
        self.rejected = rejection_metrics(torch.from_numpy(kept), torch.from_numpy(judged.scalar("stale_ratio")))
        return judged.take(np.flatnonzero(kept))

    def update(self, experience: BatchRef, roles: Roles, step: int) -> Metrics:
        loss = self.config.loss(self.context.temperature)
        steps = optimizer_steps(experience, roles.actor, loss, self.config, self.context, step)
        return steps | self.batch_metrics(experience, roles)

    def batch_metrics(self, experience: BatchRef, roles: Roles) -> Metrics:
        """What is said of a batch of experience once its optimizer steps are taken."""
        return self.rejected


class PolicyGradient(OnlinePolicy):
    """Without a critic: a sample's advantage is a function of the scores of its batch."""

    group_baseline: ClassVar[bool] = True
    """Whether a sample needs others of its prompt."""

    @classmethod
    def problems(cls, config: Any) -> list[str]:
        alone = cls.group_baseline and config.samples_per_prompt == 1
        lonely = ["samples_per_prompt: 1 sample has no group baseline; at least 2"]
        return super().problems(config) + (lonely if alone else [])

    @abstractmethod
    def advantages(self, rewards_B: Tensor, rows: BatchRef) -> Tensor:
        """(B,) float64 from the rows' scores (float64)."""

    def rewards(self, rows: BatchRef) -> Tensor:
        """(B,) float64: the scores that advantages are made of."""
        return torch.from_numpy(rows.scalar("rewards")).double()

    def experience(self, rollouts: BatchRef, roles: Roles) -> BatchRef:
        rows = self.with_logprobs(rollouts, roles)
        if self.group_baseline:
            rows = rows.take(np.flatnonzero(advantages.has_mates(group_ids(rows)).numpy()))
        return rows.with_scalars(advantages=self.advantages(self.rewards(rows), rows).numpy())

    def batch_metrics(self, experience: BatchRef, roles: Roles) -> Metrics:
        groups = group_metrics(experience) if self.group_baseline else {}
        return groups | super().batch_metrics(experience, roles)


class NormalisedGroups(PolicyGradient):
    """With GRPO's advantages (2402.03300): (r - mean) / deviation of the prompt's samples."""

    def advantages(self, rewards_B: Tensor, rows: BatchRef) -> Tensor:
        return advantages.grpo(rewards_B, group_ids(rows))


def group_ids(rows: BatchRef) -> Tensor:
    return torch.from_numpy(rows.scalar("group"))


def group_metrics(experience: BatchRef) -> Metrics:
    """Share of prompts whose samples all scored the same: with a group baseline they carry no signal."""
    if not experience.num_rows:
        return {}
    rewards_B = torch.from_numpy(experience.scalar("rewards")).double()
    *_, equal_B = advantages.group_statistics(rewards_B, group_ids(experience))
    _, first = np.unique(experience.scalar("group"), return_index=True)
    return {"group/zero_variance_share": Metric(float(equal_B[first].sum()), len(first))}
