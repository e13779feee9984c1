"""The synchronous schedule: generate, score, learn, sync, one after another.

Consumes prompts; produces metrics and scored rows; waits for every stage. Samples always come from the newest policy.
Sampling and scoring are in the generation phase, all from the log-probs to the last update in the training phase.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from hybridflow.algorithm import Algorithm
from hybridflow.batch_ref import BatchRef, Store
from hybridflow.data.seeds import sample_seed
from hybridflow.errors import HybridFlowError
from hybridflow.metrics import Metrics
from hybridflow.rewards.failures import check_share
from hybridflow.roles import Roles
from hybridflow.schedule.base import Source, StepResult
from hybridflow.schedule.intake import Intake, collect, diagnosis
from hybridflow.schedule.phases import Phases
from hybridflow.schedule.sample_metrics import failed, sample_metrics, validation_metrics
from hybridflow.spans import span

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyncSettings:
    """seed: the run's. max_empty_steps: steps in a row without a group to learn from, after which the run stops.
    max_failure_share: of a step's samples, on which the reward may fail."""

    prompts_per_step: int
    seed: int
    max_empty_steps: int
    max_failure_share: float = 0.05


class SyncSchedule:
    def __init__(
        self,
        algorithm: Algorithm,
        roles: Roles,
        prompts: Source,
        store: Store,
        phases: Phases,
        settings: SyncSettings,
    ) -> None:
        self.algorithm, self.roles, self.prompts, self.store, self.phases = algorithm, roles, prompts, store, phases
        self.settings, self.policy = settings, phases.policy
        self.empty_steps = 0

    def step(self, step: int) -> StepResult:
        taken = collect(self.algorithm, self._draw, self._sample_and_score, self.settings.prompts_per_step)
        self._check_failures(taken.scored)
        metrics = taken.metrics | sample_metrics(taken.scored)
        experience = self._experience(taken.rows) if taken.rows.num_rows else taken.rows
        if experience.num_rows:
            self.empty_steps = 0
            metrics |= self._learn(experience, step)
        else:
            self._nothing_to_learn(taken, step)
            self.phases.generate()
        if not taken.scored.num_rows:  # the algorithm skipped every prompt
            return StepResult(metrics, None, 0)
        return StepResult(metrics, taken.scored, int(taken.scored.scalar("num_tokens").sum()))

    def _experience(self, rollouts: BatchRef) -> BatchRef:
        self.phases.train()
        with span("experience"):
            return self.algorithm.experience(rollouts, self.roles)

    def _learn(self, experience: BatchRef, step: int) -> Metrics:
        with span("update"):
            metrics = self.algorithm.update(experience, self.roles, step)
        with span("sync"):
            return metrics | self.phases.sync()

    def _nothing_to_learn(self, taken: Intake, step: int) -> None:
        """The step changes no weight. Says why, and stops the run when that goes on."""
        self.empty_steps += 1
        found = f"step {step}: {type(self.algorithm).__name__} {diagnosis(taken)}"
        if self.empty_steps >= self.settings.max_empty_steps:
            raise HybridFlowError(
                f"{found}. {self.empty_steps} steps in a row (schedule.max_empty_steps): the run stops. Loosen the "
                "filter, draw more prompts a step, change the data's difficulty, or look at the reward"
            )
        logger.warning(found)

    def _check_failures(self, scored: BatchRef) -> None:
        """Over all that was sampled: a rank, or a round of refills, may have few samples and a failure among them."""

        def traceback_of(row: int) -> str:
            return scored.take([row]).fetch(self.store, ["failure"]).objects("failure")[0]

        check_share(failed(scored), self.settings.max_failure_share, traceback_of)

    def _draw(self, num_prompts: int) -> BatchRef:
        return BatchRef.put(self.prompts.next(num_prompts), self.store)

    def _sample_and_score(self, requests: BatchRef) -> BatchRef:
        with span("generate"):
            rollouts = self._sample(requests, "train")
        with span("reward"):
            return self.algorithm.score(rollouts, self.roles)

    def validate(self, num_prompts: int) -> StepResult:
        prompts = BatchRef.put(self.prompts.validation(num_prompts), self.store)
        requests = prompts.with_scalars(
            group=np.arange(prompts.num_rows), sample=np.zeros(prompts.num_rows, dtype=np.int64)
        )
        with span("validate"):
            scored = self.algorithm.score(self._sample(requests, "validate"), self.roles)
        self._check_failures(scored)
        return StepResult(validation_metrics(scored), scored, int(scored.scalar("num_tokens").sum()))

    def finish(self) -> None:
        """See `Schedule.finish`. Engines that sleep stay asleep."""
        self.phases.train()

    @contextmanager
    def trainers_whole(self) -> Iterator[None]:
        """See `Schedule.trainers_whole`."""
        self.phases.train()
        yield
        self.phases.generate()

    def state_dict(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts.state_dict(),
            "algorithm": self.algorithm.state_dict(),
            "version": self.policy.version,
            "empty_steps": self.empty_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.prompts.load_state_dict(state["prompts"])
        self.algorithm.load_state_dict(state["algorithm"])
        self.phases.restore(state["version"])
        self.empty_steps = state["empty_steps"]

    def _sample(self, requests: BatchRef, sampling: str) -> BatchRef:
        """One sample a request, in request order, beside what the request carried."""
        keys = zip(
            requests.scalar("epoch").tolist(),
            requests.scalar("position").tolist(),
            requests.scalar("sample").tolist(),
            strict=True,
        )
        seeds = np.array([sample_seed(self.settings.seed, *key) for key in keys], dtype=np.int64)
        requests = requests.with_scalars(seed=seeds)
        drawn = self.roles.rollout.generate(requests.with_scalars(atom=requests.scalar("group")), sampling).result()
        return requests.drop(["prompt_tokens"]).union(drawn)
