"""Whole steps of an algorithm, run in every way that must make no difference, and compared."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch

from hybridflow.algorithm import Algorithm
from hybridflow.batch import Batch, Ragged
from hybridflow.batch_ref import BatchRef
from hybridflow.config.locate import import_name
from hybridflow.config.run_config import RunConfig
from hybridflow.controller.balance import shard_rows
from hybridflow.loss import Loss
from hybridflow.testing import tiny
from hybridflow.testing.columns import JUNK, Maker, made_up
from hybridflow.testing.ranks import Split, SplitEngine
from hybridflow.testing.violation import require, require_close, require_finite, require_near, require_same
from hybridflow.testing.world import Subject, Trace, World, permutation

RANKS, ROWS = (1, 2, 4), (1, 2, 3, 7, None)
TOLERANCE = 1e-9
ORDERS = (1, 2)
ROLE_OF = {"values": "critic", "scores": "reward_model"}


def check_algorithm(
    algorithm: type[Algorithm] | RunConfig, config: Any = None, *, workers: Mapping[str, str] | None = None
) -> None:
    """Raises ContractViolation unless two steps of the algorithm, on a tiny real model with made-up rollouts and scores

    - have finite metrics and gradients, and at least one optimizer step that moves a weight;
    - send ranks only what pickles;
    - have the same gradients however rows are split (`check_partition`), and in whatever order they come;
    - have the same gradients and metrics with NaN, infinity or random numbers at masked slots, and in the place of
      scores that were declined;
    - are what they were when a checkpoint stands between them: state that the second reads is in `state_dict`.

    algorithm: its class; or a whole configuration (`hybridflow.config.load.load(["algorithm=mine"], Path("conf"))`),
    which says the rest. config: settings, or a mapping of their fields. The order of rows is changed with one
    mini-batch a pass: which rows share one depends on it.
    workers: what plays role instances beyond actor, critic, reference, reward and rollout, such as
    `{"teacher": "reference"}`: a role type, or the name of a worker class.
    """
    subject = _subject(algorithm, config, workers)
    found = World(subject, Split()).run(2)
    _require_sound(found, subject.name)
    _check_partition(subject, found)
    _check_order(subject, found)
    _check_junk(subject)
    _check_state(subject, found)


def check_partition(
    target: type[Algorithm] | RunConfig | Loss, config: Any = None, *, workers: Mapping[str, str] | None = None,
    columns: Mapping[str, Maker] | None = None, rows: int = 14, seed: int = 0,
) -> None:  # fmt: skip
    """Raises ContractViolation unless the gradient of an optimizer step is the same, to 1e-9 of its largest number, for
    micro-batches of 1, 2, 3, 7 and all rows on 1, 2 and 4 ranks: in float64, by the real engine, ranks simulated.

    Of a loss, on made-up rows (columns: see `check_loss`), and in another order of them too; of an algorithm, of every
    optimizer step of its first step and with its metrics (`check_algorithm` changes the order as well).
    """
    if isinstance(target, type | RunConfig):
        subject = _subject(target, config, workers)
        _check_partition(subject, World(subject, Split()).run(1))
        return
    data = made_up(target, rows, 12, tiny.VOCABULARY, columns, seed)
    generator = torch.Generator().manual_seed(seed)
    batch = _ragged(target, data, generator)
    expected = _gradient(target, batch, Split())
    require(bool(expected.any()), f"{type(target).__name__}: no weight has a gradient; nothing would be learnt")
    for ranks, size in product(RANKS, ROWS):
        split = Split(ranks, size)
        require_close(_gradient(target, batch, split), expected, TOLERANCE, _says(type(target).__name__, split))
    for order in ORDERS:
        moved = batch.take(torch.from_numpy(permutation(data.atom_B.numpy(), order)))
        text = f"{type(target).__name__}: the gradient depends on the order of the rows"
        require_close(_gradient(target, moved, Split(2, 3)), expected, TOLERANCE, text)


def _subject(algorithm: type[Algorithm] | RunConfig, config: Any, workers: Mapping[str, str] | None) -> Subject:
    if isinstance(algorithm, RunConfig):
        require(config is None and workers is None, "a whole configuration says what config and workers are")
        run, cls = algorithm, import_name(algorithm.algorithm.target)
        return _subject(cls, run.algorithm.config, _workers_of(run, cls.required_roles(run.algorithm.config)))
    if config is None or isinstance(config, Mapping):
        config = algorithm.Config.model_validate(config or {})
    problems = algorithm.problems(config)
    require(not problems, f"{algorithm.__name__}: its own configuration does not hold: {problems}")
    return Subject(algorithm, config, workers or {})


def _workers_of(run: RunConfig, roles: Sequence[str]) -> dict[str, str]:
    """Rollouts and the scores of functions are made up, so that for these the role type is enough."""
    kinds = {role: run.role_type(role) or role for role in roles}
    return {role: kind if kind in ("reward", "rollout") else run.worker(role) or kind for role, kind in kinds.items()}


def _says(name: str, split: Split) -> str:
    return (
        f"{name}: the gradient with {split} is not that of all rows at once. Weights and whatever rows share are fixed "
        "over the whole optimizer step, before any split; `atom` ties rows that must stay together"
    )


def _check_partition(subject: Subject, expected: Trace) -> None:
    """Of the first step."""
    for ranks, size in product(RANKS, ROWS):
        split = Split(ranks, size)
        found = World(subject, split).run(1)
        _require_gradients(found, expected.first(1), _says(subject.name, split))
        text = f"{subject.name} with {split} instead of all rows at once"
        require_near(found.metrics[0], expected.metrics[0], TOLERANCE, text)


def _check_order(subject: Subject, expected: Trace) -> None:
    if getattr(subject.config, "mini_batches", 1) > 1:
        config = subject.config.model_copy(update={"mini_batches": 1})
        subject = Subject(subject.algorithm, config, subject.workers)
        expected = World(subject, Split()).run(1)
    for order in ORDERS:
        found = World(subject, Split(), order).run(1)
        text = f"{subject.name}: the gradient depends on the order of groups and rows"
        _require_gradients(found, expected.first(1), text)


def _check_junk(subject: Subject) -> None:
    clean = World(subject, Split(2, 3)).run(2)
    for kind in JUNK:
        split = Split(2, 3, kind)
        found = World(subject, split).run(2)
        for step, (metrics, expected) in enumerate(zip(found.metrics, clean.metrics, strict=True)):
            require_same(metrics, expected, f"{subject.name}, step {step} with {split}")
        for ours, theirs in zip(_updates(found), _updates(clean), strict=True):
            text = f"{subject.name} with {split}: the {ours.role}'s"
            require(ours.loss == theirs.loss, f"{text} loss is {ours.loss}, without it {theirs.loss}")
            require(torch.equal(ours.gradient, theirs.gradient), f"{text} gradient changes")


def _check_state(subject: Subject, expected: Trace) -> None:
    world = World(subject, Split())
    world.run(1)
    world.revive()
    found = world.run(1)
    text = f"{subject.name}: the step after a checkpoint is another one; what it reads belongs into state_dict"
    _require_gradients(found, expected, text, tolerance=0.0)
    require_same(found.metrics[-1], expected.metrics[-1], text)


def _require_sound(found: Trace, name: str) -> None:
    for step, metrics in enumerate(found.metrics):
        require_finite(metrics, f"{name}, step {step}")
    updates = _updates(found)
    for update in updates:
        require(bool(update.gradient.isfinite().all()), f"{name}: a gradient of {update.role} is not finite")
    moving = any(bool(update.gradient.any()) for update in updates)
    require(moving, f"{name}: none of {len(updates)} optimizer steps has a gradient; nothing would be learnt")


def _updates(trace: Trace) -> list[Any]:
    return [update for step in trace.updates for update in step]


def _require_gradients(found: Trace, expected: Trace, text: str, tolerance: float = TOLERANCE) -> None:
    ours, theirs = _updates(found), _updates(expected)
    roles = [update.role for update in ours], [update.role for update in theirs]
    require(roles[0] == roles[1], f"{text}: optimizer steps {roles[0]}, expected {roles[1]}")
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        require_close(one.gradient, other.gradient, tolerance, f"{text} (optimizer step {number}, {one.role})")


def _ragged(loss: Loss, data: Any, generator: torch.Generator) -> Batch:
    """The made-up rows as a rank would hold them, with weights and tokens."""
    count, width = data.mask_BT.shape
    columns: dict[str, Any] = {
        name: column if column.ndim == 1 else Ragged.from_padded(column, data.lengths_B)
        for name, column in data.columns.items()
    }
    tokens_BT = torch.randint(3, tiny.VOCABULARY, (count, width), generator=generator)
    columns |= {
        "tokens": Ragged.from_padded(tokens_BT, data.lengths_B),
        "response_mask": Ragged.from_padded(data.mask_BT, data.lengths_B),
        "num_tokens": data.lengths_B,
        "loss_weight": (0.5 + torch.rand(count, generator=generator, dtype=torch.float64)) / count,
    }
    return Batch(columns if loss.atom == "row" else columns | {"atom": data.atom_B})


def _gradient(loss: Loss, batch: Batch, split: Split) -> torch.Tensor:
    """Summed over the ranks' shards, as the controller cuts them."""
    kinds = {ROLE_OF.get(name, "actor") for name in loss.outputs}
    require(len(kinds) == 1, f"{type(loss).__name__}: no one model gives {', '.join(loss.outputs)}")
    role = kinds.pop()
    found = tiny.member(f"{role} under training", tiny.trainer(role))
    found.reset()
    engine = SplitEngine(role, found.engine, split, [])
    rows = BatchRef.put(batch, tiny.STORE)
    shards: Sequence[Any] = shard_rows(rows, split.ranks)
    for shard in shards:
        engine.train([(batch.take(torch.from_numpy(shard)), loss)])
    return engine.steps[0].gradient
