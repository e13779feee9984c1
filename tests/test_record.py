"""What a run leaves behind: spans of every part, samples of validation, first words and last, checkpoints with room."""

import errno
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hybridflow.batch_ref import BatchRef
from hybridflow.checkpoint import store as store_module
from hybridflow.checkpoint.resume import Resumption
from hybridflow.checkpoint.run_state import RunState
from hybridflow.checkpoint.store import CheckpointStore
from hybridflow.controller.coordinates import Shape
from hybridflow.controller.dispatch import dispatch
from hybridflow.controller.local_runtime import LocalRuntime
from hybridflow.controller.worker import Worker, WorkerContext
from hybridflow.errors import CheckpointError, RankFailure
from hybridflow.record import RunCheckpoints, RunRecord, Totals, _timings
from hybridflow.schedule.base import StepResult
from hybridflow.spans import Span, span
from hybridflow.tracking.run_folder import RunFolder
from hybridflow.tracking.settings import TrackingSettings
from hybridflow.tracking.sinks import Tracker
from hybridflow.tracking.timeline import read_rows

MIB = 1 << 20


class Trained(Worker):
    """A trained role and a reward in one; what it does on `save` and `load` is given. `recorded` outlives it."""

    def __init__(self, context: WorkerContext, fault: BaseException | None, recorded: list[Any]) -> None:
        super().__init__(context)
        self.fault, self.recorded = fault, recorded

    @dispatch("ONE_TO_ALL")
    def save(self, folder: str) -> None:
        (Path(folder) / "half.bin").write_bytes(b"1" * MIB)
        if self.fault:
            raise self.fault

    @dispatch("ONE_TO_ALL")
    def load(self, folder: str) -> None:
        if self.fault:
            raise self.fault

    @dispatch("ONE_TO_ALL")
    def record(self, batch: BatchRef, step: int, kind: str) -> None:
        self.recorded.append((kind, step, batch.num_rows))


class Schedule:
    state: dict[str, Any]

    def trainers_whole(self) -> AbstractContextManager[None]:
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        return {"version": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Lines:
    errors: tuple[type[Exception], ...] = ()

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, values: Any) -> None:
        self.logged.append((step, dict(values)))

    def close(self) -> None: ...


def group(folder: Path, name: str, fault: BaseException | None = None, recorded: list[Any] | None = None) -> Any:
    runtime = LocalRuntime(folder)
    pool = runtime.pool("pool")
    return runtime.group(
        name, partial(Trained, fault=fault, recorded=[] if recorded is None else recorded), pool, Shape(data=1)
    )


def checkpoints(folder: RunFolder, actor: Any, **changes: Any) -> RunCheckpoints:
    given: dict[str, Any] = {"resumption": None, "models": {}, "first_bytes": 0, **changes}
    store = CheckpointStore(folder.checkpoints, keep=1)
    return RunCheckpoints(store, folder, schedule=Schedule(), trained={"actor": actor}, config={}, **given)


def record(folder: RunFolder, groups: dict[str, Any]) -> tuple[RunRecord, Lines]:
    lines = Lines()
    return RunRecord(folder, Tracker({"lines": lines}), groups, TrackingSettings(), Totals(), 1.0, 1.0), lines


def result(rows: int) -> StepResult:
    return StepResult({}, BatchRef(rows, {}, {"x": np.zeros(rows)}), 10)


def test_every_span_is_collected_under_its_step_and_every_sample_recorded(tmp_path: Path) -> None:
    recorded: list[Any] = []
    folder = RunFolder(tmp_path)
    made, lines = record(folder, {"reward": group(tmp_path, "reward", recorded=recorded)})
    with span("validate"):
        pass
    made.validation(0, {"val/accuracy": 0.25}, result(3))
    for step in (0, 1):
        with span("step"):
            pass
        made.step(step, {"timing_s/step": 1.0}, result(5))
        with span("checkpoint"):
            pass
        made.checkpoint(step + 1)
    with span("export"):
        pass
    made.report()
    assert recorded == [("validate", 0, 3), ("step", 1, 5), ("step", 2, 5)]
    names = [s.name for s in read_rows(folder.timeline)["driver"]]
    assert names == ["validate", "step", "checkpoint", "step", "checkpoint", "export"]
    timed = [(step, sorted(k for k in values if k.startswith("timing_s/"))) for step, values in lines.logged]
    assert timed == [
        (0, ["timing_s/validate"]), (1, ["timing_s/step"]), (2, ["timing_s/checkpoint", "timing_s/step"]),
    ]  # fmt: skip
    folder.rewind(1)
    assert [s.name for s in read_rows(folder.timeline)["driver"]] == ["validate", "step", "checkpoint"]


def test_a_timing_is_the_slowest_ranks_and_counts_a_nested_span_once() -> None:
    nested = [Span("receive", 10, 14), Span("receive", 11, 13), Span("probe", 13, 14), Span("receive", 20, 21)]
    found = _timings({"driver": [Span("sync", 0, 3)], "rollout-0": nested, "rollout-1": [Span("receive", 10, 16)]})
    assert found == {"timing_s/sync": 3, "timing_s/rollout_receive": 6, "timing_s/rollout_probe": 1}


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ({}, None),
        ({0: 0.25}, "held-out accuracy   25.0%"),
        ({0: 0.25, 2: 0.5}, "25.0% before, 50.0% after"),
        ({2: 0.25, 4: 0.5}, "held-out accuracy   50.0%"),
    ],
)
def test_before_is_what_was_measured_before_the_first_step(
    measured: dict[int, float], said: str | None, tmp_path: Path
) -> None:
    made, _ = record(RunFolder(tmp_path), {})
    for step, accuracy in measured.items():
        made.validation(step, {"val/accuracy": accuracy}, StepResult({}, None, 0))
    report = made.report()
    assert said in report if said else "accuracy" not in report


@pytest.mark.parametrize("name", ["val/accuracy", "val/preference_accuracy", "val/step_accuracy"])
def test_what_counts_as_held_out_accuracy(name: str, tmp_path: Path) -> None:
    made, _ = record(RunFolder(tmp_path), {})
    for step, accuracy in ((0, 0.5), (3, 0.75)):
        made.validation(step, {"val/preference_margin": 9.0, name: accuracy}, StepResult({}, None, 0))
    assert "50.0% before, 75.0% after" in made.report()


def test_before_survives_a_resume(tmp_path: Path) -> None:
    folder, actor = RunFolder(tmp_path), group(tmp_path, "actor")
    first = checkpoints(folder, actor, models={"m": "blake2b:1"})
    first.totals.accuracy, first.totals.accuracy_before = [0.25, 0.5], 0.25
    first.save(4)
    resumption = Resumption.find(first.store, {}, lambda: {"m": "blake2b:1"})
    again = checkpoints(folder, actor, resumption=resumption)
    assert again.restore() == 4
    assert (again.totals.accuracy, again.totals.accuracy_before) == ([0.25, 0.5], 0.25)
    assert again.schedule.state == {"version": 3}  # type: ignore[attr-defined]


def test_nothing_is_forgotten_before_every_engine_holds_the_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    checkpoints(folder, group(tmp_path, "actor")).save(1)
    newest = CheckpointStore(folder.checkpoints).latest()
    assert newest is not None
    (folder.checkpoints / "step-000002").mkdir()
    folder.metrics.write_text('{"step": 1}\n{"step": 2}\n')
    resumption = Resumption(newest, RunState.load(newest.path))
    with pytest.raises(RankFailure, match="another shape"):
        checkpoints(folder, group(tmp_path, "actor", CheckpointError("another shape")), resumption=resumption).restore()
    assert folder.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (folder.checkpoints / "step-000002").exists()
    assert checkpoints(folder, group(tmp_path, "actor"), resumption=resumption).restore() == 1
    assert folder.metrics.read_text() == '{"step": 1}\n'
    assert not (folder.checkpoints / "step-000002").exists()


def test_the_first_checkpoint_needs_room_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=50 * MIB))
    first = checkpoints(folder, group(tmp_path, "actor"), first_bytes=80 * MIB)
    with pytest.raises(CheckpointError, match=r"step 1: needs 80\.0 MiB, but the disk of .* has 50\.0 MiB free"):
        first.save(1)
    checkpoints(folder, group(tmp_path, "actor"), first_bytes=40 * MIB).save(1)
    first.save(2)  # now there is one to measure


def test_a_rank_that_fills_the_disk_is_a_checkpoint_error(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(
        CheckpointError, match=r"(?s)step 1: the disk of .*checkpoints is full: .* free .*about 4\.0 MiB"
    ):
        checkpoints(folder, group(tmp_path, "actor", full), first_bytes=4 * MIB).save(1)
    with pytest.raises(RankFailure, match="another reason"):
        checkpoints(folder, group(tmp_path, "actor", OSError(errno.EIO, "another reason"))).save(1)
    assert not list(folder.checkpoints.iterdir())
