"""A schedule says what may run while what. The trainer calls it once a step and knows no more."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from hybridflow.batch_ref import BatchRef
from hybridflow.metrics import Metrics


@dataclass(frozen=True)
class StepResult:
    """Of a step, or of a validation. samples: the scored rows, for the record (None when nothing was sampled)."""

    metrics: Metrics
    samples: BatchRef | None
    num_tokens: int


class Schedule(Protocol):
    def step(self, step: int) -> StepResult:
        """One step of the algorithm: data in, weights moved, engines in sync."""
        ...

    def validate(self, num_prompts: int) -> StepResult:
        """Scores of held-out prompts under the current policy, or an offline algorithm's measure of held-out rows."""
        ...

    def finish(self) -> None:
        """Nothing is sampled any more: trained roles hold all that is theirs, to be exported."""
        ...

    def trainers_whole(self) -> AbstractContextManager[None]:
        """Inside, trained roles hold all that is theirs on their devices: they can save, load and export."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Source(Protocol):
    """Where rows come from: prompts, or rows with their responses. Pure function of (seed, cursor)."""

    def next(self, num_prompts: int) -> Any: ...

    def validation(self, num_prompts: int) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
