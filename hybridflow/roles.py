"""What an algorithm may ask of each role. A run holds named instances; these protocols are their types.

Every call returns a `Future`; a batch argument may itself be a `Future`. Token-level results stay on the ranks: what
comes back is a `BatchRef`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

from torch import Tensor

from hybridflow.batch import Batch
from hybridflow.batch_ref import BatchRef
from hybridflow.controller.futures import Future
from hybridflow.errors import HybridFlowError, did_you_mean
from hybridflow.loss import Loss
from hybridflow.metrics import Metrics

Rows = BatchRef | Future[BatchRef]

MemoryPart = Literal["gradients", "optimizer", "weights"]
"""What a trained role holds, by what it is for. optimizer: its states, and float32 masters beside narrower weights."""

MAX_WHOLE_VOCABULARY = 16_384
"""The largest vocabulary of which a reference gives whole vectors, one a token: 64 KiB each."""


class Role(Protocol):
    """Work on columns that belongs to no model runs where the rows are."""

    def compute(self, fn: Callable[[Batch], Batch], batch: Rows) -> Future[BatchRef]:
        """New columns of the same rows."""
        ...

    def reduce(self, fn: Callable[[Batch], Mapping[str, Tensor]], batch: Rows) -> Future[dict[str, float]]:
        """Sum over all rows, in the caller's row order, of per-row float64 values (B,)."""
        ...


class Actor(Role, Protocol):
    def logprobs(self, batch: Rows, *, temperature: float, column: str) -> Future[BatchRef]:
        """Writes `column`."""
        ...

    def update(self, batch: Rows, loss: Loss) -> Future[Metrics]:
        """One optimizer step on the sum of `loss_weight * loss` over trainable tokens."""
        ...

    def update_jointly(self, batch: Rows, loss: Loss, second: Rows, second_loss: Loss) -> Future[Metrics]:
        """One optimizer step on the sum of two such sums, each over rows of its own."""
        ...


class Reference(Role, Protocol):
    def logprobs(self, batch: Rows, *, temperature: float, column: str) -> Future[BatchRef]: ...

    def vocab_logprobs(
        self, batch: Rows, *, temperature: float, column: str, top_k: int | None = None
    ) -> Future[BatchRef]:
        """Writes `column`, a vector a token: log-probs of the whole vocabulary, V numbers (at most
        MAX_WHOLE_VOCABULARY); or of its k likeliest tokens and of all others together, k + 1 numbers, and
        `<column>_ids`, which tokens those are."""
        ...


class ActorReference:
    """The reference of an actor that trains an adapter: the actor's own ranks and weights, with the adapter off."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def logprobs(self, batch: Rows, *, temperature: float, column: str) -> Future[BatchRef]:
        return self._actor.reference_logprobs(batch, temperature=temperature, column=column)

    def compute(self, fn: Callable[[Batch], Batch], batch: Rows) -> Future[BatchRef]:
        return self._actor.compute(fn, batch)

    def reduce(self, fn: Callable[[Batch], Mapping[str, Tensor]], batch: Rows) -> Future[dict[str, float]]:
        return self._actor.reduce(fn, batch)


class Critic(Role, Protocol):
    def values(self, batch: Rows, *, column: str = "values") -> Future[BatchRef]:
        """Writes `column`: V of the state before each token."""
        ...

    def update(self, batch: Rows, loss: Loss) -> Future[Metrics]: ...


class Reward(Role, Protocol):
    def score(self, batch: Rows) -> Future[BatchRef]:
        """Writes `rewards`, `abstained`, `failed` and, of a failed row, why: `failure`."""
        ...


class Rollout(Role, Protocol):
    def generate(self, requests: Rows, sampling: str = "train") -> "Groups":
        """Draws one sample a row of `requests`; `sampling` is `train` or `validate`."""
        ...


class Groups(Protocol):
    """A stream of finished groups (arrival order); `result` gives all rows in request order."""

    def __iter__(self) -> Iterator[BatchRef]: ...

    def result(self, timeout_s: float | None = None) -> BatchRef: ...


class Roles:
    """The run's role instances by name: `roles.actor`, `roles.cost_critic`."""

    def __init__(self, instances: Mapping[str, Any]) -> None:
        self._instances = dict(instances)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._instances:
            known = sorted(self.__dict__.get("_instances", {}))
            hint = did_you_mean(name, known)
            raise HybridFlowError(f"roles: this run has no role {name!r}; it has {', '.join(known)}{hint}")
        return self._instances[name]

    def __contains__(self, name: str) -> bool:
        return name in self._instances

    def names(self) -> list[str]:
        return list(self._instances)
