"""The offline schedule: rows come with their responses, so a step is one batch of rows and its optimizer steps."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from hybridflow.algorithm import Algorithm
from hybridflow.batch_ref import BatchRef, Store
from hybridflow.roles import Roles
from hybridflow.schedule.base import Source, StepResult
from hybridflow.spans import span


class OfflineSchedule:
    def __init__(self, algorithm: Algorithm, roles: Roles, rows: Source, store: Store, rows_per_step: int) -> None:
        self.algorithm, self.roles, self.rows, self.store = algorithm, roles, rows, store
        self.rows_per_step = rows_per_step

    def step(self, step: int) -> StepResult:
        rows = BatchRef.put(self.rows.next(self.rows_per_step), self.store)
        with span("experience"):
            experience = self.algorithm.experience(rows, self.roles)
        with span("update"):
            metrics = self.algorithm.update(experience, self.roles, step)
        return StepResult(metrics, None, int(rows.scalar("num_tokens").sum()))

    def validate(self, num_prompts: int) -> StepResult:
        """Nothing is sampled offline: the algorithm's own measure of held-out rows, where it has one."""
        if type(self.algorithm).evaluate is Algorithm.evaluate:
            return StepResult({}, None, 0)
        rows = BatchRef.put(self.rows.validation(num_prompts), self.store)
        with span("validate"):
            metrics = self.algorithm.evaluate(rows, self.roles)
        return StepResult(metrics, None, int(rows.scalar("num_tokens").sum()))

    def finish(self) -> None:
        """See `Schedule.finish`: as ever."""

    def trainers_whole(self) -> AbstractContextManager[None]:
        """See `Schedule.trainers_whole`: always."""
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows.state_dict(), "algorithm": self.algorithm.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows.load_state_dict(state["rows"])
        self.algorithm.load_state_dict(state["algorithm"])
