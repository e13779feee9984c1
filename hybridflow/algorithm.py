"""The plug-in contract: an algorithm is one object with five hooks. A plug-in adds a file and a YAML entry.

An offline algorithm (SFT, DPO) has `online = False` and uses `experience`, `update` and `evaluate` alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from hybridflow.batch_ref import BatchRef
from hybridflow.controller.futures import Future
from hybridflow.data.settings import RowKind
from hybridflow.errors import RewardError
from hybridflow.metrics import Metrics
from hybridflow.roles import Roles
from hybridflow.settings import Settings

Verdict = Literal["keep", "drop", "refill"]


class RowSource(Protocol):
    """Rows beside the run's own data, one batch after another. Its state belongs into the algorithm's `state_dict`."""

    def next(self, count: int) -> BatchRef: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class AlgorithmContext:
    """What an algorithm may know of the run around it. max_response_tokens: sampled ones. data: the sources that
    `Algorithm.extra_rows` asked for."""

    seed: int
    temperature: float
    max_response_tokens: int
    data: Mapping[str, RowSource] = field(default_factory=dict)


class Algorithm(ABC):
    """Base of all algorithms: one sample a prompt, reward scored, every group kept.

    online: samples are drawn from the policy. rows: the kind of rows that the data gives. product: the trained role
    instance that the run exports. least_prompts: the fewest prompts (rows, pairs) that a step can have.
    """

    online: ClassVar[bool] = True
    rows: ClassVar[RowKind] = "prompts"
    product: ClassVar[str] = "actor"
    least_prompts: ClassVar[int] = 1

    class Config(Settings):
        """Fields of the algorithm's YAML entry."""

    def __init__(self, config: Any, context: AlgorithmContext) -> None:
        self.config = config
        self.context = context

    @classmethod
    def required_roles(cls, config: Any) -> tuple[str, ...]:
        """Names of the role instances that this configuration calls."""
        return ("actor", "rollout", "reward") if cls.online else ("actor",)

    @classmethod
    def samples_per_prompt(cls, config: Any) -> int:
        """Rows that a step has for each prompt."""
        return 1

    @classmethod
    def sequences_per_update(cls, config: Any, prompts_per_step: int) -> int:
        """Rows of one optimizer step (the largest, where they differ)."""
        return prompts_per_step * cls.samples_per_prompt(config)

    @classmethod
    def trained_rows(cls, config: Any, prompts_per_step: int) -> int:
        """Rows of a step that enter its optimizer steps (the most, where they differ)."""
        return prompts_per_step * cls.samples_per_prompt(config)

    @classmethod
    def max_draws(cls, config: Any) -> int:
        """How often a step may draw prompts: 1, or more where `accept` asks for refills or `requests` skips prompts."""
        return 1

    @classmethod
    def extra_rows(cls, config: Any) -> Mapping[str, RowKind]:
        """Sources that it reads beside the run's own data (`extra_data.<name>`), and the kind of their rows."""
        return {}

    @classmethod
    def problems(cls, config: Any) -> list[str]:
        """Combinations of fields that make no sense, each as `key: found; allowed`."""
        return []

    @classmethod
    def problems_in(cls, config: Any, context: AlgorithmContext) -> list[str]:
        """Fields that do not fit the run around them, as in `problems`. `context.data` is not open yet."""
        return []

    @classmethod
    def model_problems(cls, config: Any, facts: Mapping[str, Any]) -> list[str]:
        """As `problems`, of what does not go with the run's model; facts: its Hugging Face config, as far as known."""
        return []

    def requests(self, prompts: BatchRef) -> BatchRef:
        """One row a sample to draw, with `group` and `sample`; the trainer adds the seeds. May leave prompts out."""
        return expand(prompts, type(self).samples_per_prompt(self.config))

    def score(self, rollouts: BatchRef, roles: Roles) -> BatchRef:
        """Adds the per-sample scalars that `accept` and `experience` read. With several rewards, a row is `abstained`
        or `failed` where any of them says so: the share of rows that failed decides whether the run goes on."""
        return scored_by(rollouts, roles.reward.score(rollouts))

    def accept(self, group: BatchRef) -> Verdict:
        """Called once a group, in request order. `drop` makes the step smaller, `refill` draws another prompt."""
        return "keep"

    def experience(self, rollouts: BatchRef, roles: Roles) -> BatchRef:
        """Adds every column that `update` reads."""
        return rollouts

    @abstractmethod
    def update(self, experience: BatchRef, roles: Roles, step: int) -> Metrics:
        """Takes the step's optimizer steps."""

    def evaluate(self, rows: BatchRef, roles: Roles) -> Metrics:
        """Of an offline algorithm: what held-out rows say of the trained role, without a gradient; `val/` metrics."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the next step reads and nothing else holds (adaptive coefficients, dual variables)."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state, f"{type(self).__name__} has no state but was given {sorted(state)}"


def expand(prompts: BatchRef, samples_per_prompt: int) -> BatchRef:
    """`samples_per_prompt` adjacent rows a prompt; `group` numbers the prompts of the batch."""
    rows = prompts.repeat(samples_per_prompt)
    sample = np.tile(np.arange(samples_per_prompt), prompts.num_rows)
    return rows.with_scalars(group=np.repeat(np.arange(prompts.num_rows), samples_per_prompt), sample=sample)


def joined(batch: BatchRef, *futures: Future[BatchRef]) -> BatchRef:
    """`batch` and the columns of all futures, which run side by side until the last is there."""
    for future in futures:
        batch = batch.union(future.result())
    return batch


def scored_by(rollouts: BatchRef, rewards: Future[BatchRef], **others: Future[BatchRef]) -> BatchRef:
    """`rollouts` with what the reward says and, under its own name (`costs=...`), the score of each other one. A row
    that any of them declined, or failed on, is abstained, or failed; `failure` is the first one's. Raises RewardError
    where a score is not finite: NaN compares as neither best nor worst, so filters would drop it without a word."""
    said = _finite("rewards", rewards.result())
    for name, future in others.items():
        other, failed = _finite(name, future.result()), said.scalar("failed").astype(bool)
        both = BatchRef.concat([said.select(["failure"]), other.select(["failure"])])
        said = said.union(both.take(np.arange(said.num_rows) + said.num_rows * ~failed)).with_scalars(
            abstained=said.scalar("abstained").astype(bool) | other.scalar("abstained").astype(bool),
            failed=failed | other.scalar("failed").astype(bool),
            **{name: other.scalar("rewards")},
        )
    return rollouts.union(said)


def _finite(name: str, said: BatchRef) -> BatchRef:
    scores_B = said.scalar("rewards")
    wrong = np.flatnonzero(~np.isfinite(scores_B) & ~said.scalar("abstained").astype(bool))
    if len(wrong):
        raise RewardError(
            f"{name}: found {scores_B[wrong[0]]} for sample {wrong[0]} ({len(wrong)} of {len(scores_B)} samples); "
            "expected finite numbers, or samples that are abstained. Look at the model or function that scores them"
        )
    return said


def minibatches(batch: BatchRef, epochs: int, count: int, seed: int) -> Iterator[BatchRef]:
    """`epochs` passes over `batch`, each a fresh permutation cut into `count` parts of nearly equal atom counts.

    Rows that share the scalar `atom` (the two of a pair) stay together, in their order; without it each row is an atom.
    A pure function of `seed`. With one epoch and one part the rows keep their order; an empty batch has no part.
    """
    atom_B = batch.scalars.get("atom", np.arange(batch.num_rows))
    _, first, inverse = np.unique(atom_B, return_index=True, return_inverse=True)
    members = [np.flatnonzero(inverse == k) for k in np.argsort(first)] if len(first) < batch.num_rows else None
    for epoch in range(epochs):
        order = np.arange(len(first))
        if epochs * count > 1:
            np.random.default_rng([seed, epoch]).shuffle(order)
        for part in np.array_split(order, min(count, len(order)) or 1):
            if len(part):
                yield batch.take(part if members is None else np.concatenate([members[k] for k in part]))
