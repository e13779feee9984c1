"""A whole run in one process, on a tiny model: the real schedule, workers and engine, on rows that nobody sampled."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from hybridflow import spans
from hybridflow.algorithm import Algorithm, AlgorithmContext
from hybridflow.batch import Batch
from hybridflow.batch_ref import BatchRef
from hybridflow.config.run_config import RoleType
from hybridflow.controller.coordinates import Coordinates, Shape
from hybridflow.controller.worker import WorkerContext
from hybridflow.data.prompts import PromptSource
from hybridflow.data.stored_rows import StoredRows
from hybridflow.errors import NonFiniteError
from hybridflow.metrics import Metrics
from hybridflow.roles import Roles
from hybridflow.schedule.offline import OfflineSchedule
from hybridflow.schedule.phases import Phases, PhaseSettings
from hybridflow.schedule.sync import SyncSchedule, SyncSettings
from hybridflow.testing import ranks, tiny
from hybridflow.testing.made_up_roles import LONGEST, MadeUpReward, MadeUpRollout
from hybridflow.testing.ranks import OptimizerStep, Split, spoilt
from hybridflow.testing.violation import ContractViolation, require

SEED, TEMPERATURE, PROMPTS = 3, 0.8, 6


@dataclass(frozen=True)
class Subject:
    """What is under test. workers: of role instances beyond the usual five, a role type or the dotted name of a worker
    class."""

    algorithm: type[Algorithm]
    config: Any
    workers: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.algorithm.__name__

    def worker(self, role: str) -> str:
        """Role type or dotted name. Raises ContractViolation for an instance that nobody described."""
        given = self.workers.get(role, role)
        if given in get_args(RoleType) or "." in given:
            return given
        raise ContractViolation(
            f"{self.name} calls a role {role!r}; say what plays it: workers={{{role!r}: 'reference'}}, or another of "
            f"{', '.join(get_args(RoleType))}, or the name of a worker class"
        )


@dataclass
class Trace:
    """What a run did: the metrics of each step, and every optimizer step of it."""

    metrics: list[Metrics] = field(default_factory=list)
    updates: list[list[OptimizerStep]] = field(default_factory=list)

    def first(self, steps: int) -> "Trace":
        return Trace(self.metrics[:steps], self.updates[:steps])


class Unsynced:
    """In the place of the policy's engines: there are none."""

    version = 0

    def sync(self, loaded: object = None) -> Metrics:
        self.version += 1
        return {}

    def restore(self, version: int, loaded: object = None) -> None:
        self.version = version


class SpoiltRows:
    """A source whose rows come in another order, those of one atom together, and with junk at masked slots."""

    def __init__(self, source: PromptSource, split: Split, order: int | None) -> None:
        self.source, self.split, self.order = source, split, order

    def next(self, count: int) -> Batch:
        rows = self.source.next(count)
        if "response_mask" not in rows:
            return rows
        atoms = rows.tensor("atom").numpy() if "atom" in rows else np.arange(rows.num_rows)
        moved = rows.take(permutation(atoms, self.order).tolist())
        return spoilt(moved, moved, self.split)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


class ShuffledSchedule(SyncSchedule):
    """The algorithm sees the step's rows in another order."""

    order: int | None = None

    def _experience(self, rollouts: BatchRef) -> BatchRef:
        return super()._experience(rollouts.take(permutation(np.arange(rollouts.num_rows), self.order)))


def permutation(atom_B: np.ndarray, order: int | None) -> np.ndarray:
    """Row indices: atoms in another order (a function of `order`; None leaves it), each with its rows as they were."""
    atoms = np.unique(atom_B)
    if order is not None:
        np.random.default_rng(order).shuffle(atoms)
    return np.concatenate([np.flatnonzero(atom_B == atom) for atom in atoms]) if len(atoms) else atoms


class World:
    """One run. `order`: the seed of another order of rows."""

    def __init__(self, subject: Subject, split: Split, order: int | None = None) -> None:
        self.subject, self.split, self.order = subject, split, order
        self.steps: list[OptimizerStep] = []
        self.trace = Trace()
        self.roles = Roles({name: self._role(name) for name in self._names()})
        self.schedule = self._schedule()

    def run(self, count: int) -> Trace:
        for _ in range(count):
            self.step()
        return self.trace

    def step(self) -> None:
        try:
            result = self.schedule.step(len(self.trace.metrics))
        except NonFiniteError as error:
            raise ContractViolation(f"{self.subject.name} with {self.split}: {error}") from error
        spans.recorder.drain()
        self.trace.metrics.append(result.metrics)
        self.trace.updates.append(list(self.steps))
        self.steps.clear()

    def revive(self) -> None:
        """Go on with a new algorithm and new sources, which know only what a checkpoint keeps."""
        state = self.schedule.state_dict()
        kept = json.loads(json.dumps(state))
        require(kept == state, f"{self.subject.name}.state_dict: JSON changes it from {state} to {kept}; keep it plain")
        self.schedule = self._schedule()
        self.schedule.load_state_dict(kept)
        again = json.loads(json.dumps(self.schedule.state_dict()))
        require(again == kept, f"{self.subject.name}.load_state_dict: loads {kept} and then says {again}")

    def _names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.subject.algorithm.required_roles(self.subject.config)))

    def _role(self, name: str) -> Any:
        kind, folder = self.subject.worker(name), tiny.configuration().run_folder
        context = WorkerContext(name, Coordinates(0, Shape()), tiny.STORE, "localhost", 0, "local", folder)
        if kind == "rollout":
            made = MadeUpRollout(context, tiny.member("actor", self._class_name("actor")).engine, TEMPERATURE)
            return ranks.group(name, tiny.Member(made, None, {}), self.split, self.steps)
        if kind == "reward":
            scorer = MadeUpReward(context, self.split.spoilt)
            return ranks.group(name, tiny.Member(scorer, None, {}), self.split, self.steps)
        return ranks.group(name, tiny.member(name, self._class_name(name)), self.split, self.steps)

    def _class_name(self, role: str) -> str:
        kind = self.subject.worker(role)
        return kind if "." in kind else tiny.configuration().workers[kind]

    def _schedule(self) -> SyncSchedule | OfflineSchedule:
        cls, config = self.subject.algorithm, self.subject.config
        extra = {name: StoredRows(self._source(kind, 1), tiny.STORE) for name, kind in cls.extra_rows(config).items()}  # type: ignore[arg-type]
        algorithm = cls(config, AlgorithmContext(SEED, TEMPERATURE, LONGEST, extra))
        rows: Any = self._source(cls.rows, 0)
        if not cls.online:
            return OfflineSchedule(algorithm, self.roles, rows, tiny.STORE, PROMPTS)
        policy: Any = Unsynced()
        settings = SyncSettings(PROMPTS, SEED, max_empty_steps=1)
        phases = Phases(policy, None, {}, PhaseSettings())
        schedule = ShuffledSchedule(algorithm, self.roles, rows, tiny.STORE, phases, settings)
        schedule.order = self.order
        return schedule

    def _source(self, kind: Any, seed: int) -> SpoiltRows:
        return SpoiltRows(tiny.source(kind, seed), self.split, self.order)
