"""What a run leaves behind while it goes: metrics, samples, the timeline, and checkpoints that it can go on from."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hybridflow.checkpoint.resume import Resumption
from hybridflow.checkpoint.run_state import RunState
from hybridflow.checkpoint.store import CheckpointStore
from hybridflow.controller.futures import gather
from hybridflow.schedule.base import Schedule, StepResult
from hybridflow.spans import Span, recorder
from hybridflow.tracking.run_folder import RunFolder, software_versions
from hybridflow.tracking.settings import TrackingSettings
from hybridflow.tracking.sinks import Tracker
from hybridflow.tracking.summary import final_report
from hybridflow.tracking.timeline import Timeline, read_sessions, time_of_sessions

ACCURACIES = ("val/accuracy", "val/preference_accuracy", "val/step_accuracy")
"""What the last words call held-out accuracy: of answers, of preferences, or of the steps of solutions."""


@dataclass
class Totals:
    """Sums over the whole run, kept through a resume. accuracy: held-out, in the order measured. accuracy_before: the
    one that was measured before the first step."""

    tokens: int = 0
    seconds: float = 0.0
    accuracy: list[float] = field(default_factory=list)
    accuracy_before: float | None = None


class RunRecord:
    """Collects, once a step, what every rank measured. `groups` are the run's worker groups by role instance name."""

    def __init__(
        self, folder: RunFolder, tracker: Tracker, groups: Mapping[str, Any], settings: TrackingSettings,
        totals: Totals, num_cores: float, num_devices: float,
    ) -> None:  # fmt: skip
        self.folder, self.tracker, self.groups, self.settings = folder, tracker, groups, settings
        self.totals, self.num_cores, self.num_devices = totals, num_cores, num_devices
        self.timeline = Timeline(folder.timeline) if settings.timeline else None
        self._newest_step = 0
        self._checkpoint_timings: dict[str, float] = {}
        self._usage = self._cpu_seconds()
        recorder.drain()
        for group in self.groups.values():
            group.drain_spans().result()

    def step(self, step: int, metrics: dict[str, float], result: StepResult) -> None:
        self._record_samples(result, step + 1, "step")
        spans = self._collect(step + 1)
        usage, self._usage = self._usage, self._cpu_seconds()
        wall_s = self._usage[0] - usage[0]
        metrics["perf/cpu_utilisation"] = (self._usage[1] - usage[1]) / (wall_s * self.num_cores)
        self.totals.tokens += result.num_tokens
        self.totals.seconds += metrics["timing_s/step"]
        self.tracker.log(step + 1, metrics | self._checkpoint_timings | _timings(spans))
        self._checkpoint_timings = {}

    def validation(self, step: int, metrics: dict[str, float], result: StepResult) -> None:
        """After `step` finished steps. Logs its seconds as one number: their parts have the names of a step's parts."""
        self._record_samples(result, step, "validate")
        timings = _timings(self._collect(step))
        whole = {name: seconds for name, seconds in timings.items() if name == "timing_s/validate"}
        accuracy = next((metrics[name] for name in ACCURACIES if name in metrics), None)
        if accuracy is not None:
            self.totals.accuracy.append(accuracy)
            if step == 0:
                self.totals.accuracy_before = accuracy
        self.tracker.log(step, metrics | whole)

    def checkpoint(self, step: int) -> None:
        """Its seconds are logged with the next step's."""
        self._checkpoint_timings = _timings(self._collect(step))

    def report(self) -> str:
        """The last words of the run."""
        self._collect(self._newest_step)
        totals, measured_since = self.totals, len(self.totals.accuracy) > 1
        return final_report(
            run_folder=self.folder.path,
            accuracy_before=totals.accuracy_before if measured_since else None,
            accuracy_after=totals.accuracy[-1] if totals.accuracy else None,
            tokens=totals.tokens,
            seconds=totals.seconds,
            num_devices=self.num_devices,
            time_table=time_of_sessions(read_sessions(self.folder.timeline)) if self.timeline else (),
        )

    def _record_samples(self, result: StepResult, step: int, kind: Literal["step", "validate"]) -> None:
        if self.settings.samples and result.samples is not None and "reward" in self.groups:
            self.groups["reward"].record(result.samples, step, kind).result()

    def _collect(self, step: int) -> dict[str, list[Span]]:
        """Spans since the last call by process, the driver and every rank; `step` is the one that they belong to."""
        self._newest_step = step
        spans = {"driver": recorder.drain()}
        futures = {name: group.drain_spans() for name, group in self.groups.items()}
        for name, future in futures.items():
            spans |= {f"{name}-{rank}": found for rank, found in enumerate(future.result())}
        for row, found in spans.items():
            if self.timeline:
                self.timeline.add(row, found)
        if self.timeline:
            self.timeline.write(step)
        return spans

    def _cpu_seconds(self) -> tuple[float, float]:
        """(now, processor seconds so far of all ranks and their children)."""
        answers = gather([group.cpu_seconds() for group in self.groups.values()])
        by_process = dict(rank for ranks in answers for rank in ranks)  # runtime=local: all roles are one process
        return time.perf_counter(), float(sum(by_process.values()))


def _timings(spans: Mapping[str, list[Span]]) -> dict[str, float]:
    """timing_s/<driver's span> and timing_s/<role>_<method>: seconds of this step, the slowest rank's. Inside a span of
    its own name (a rank's call and what the method says of itself) one counts no second time."""
    timings: dict[str, float] = {}
    for row, found in spans.items():
        prefix = "" if row == "driver" else row.rsplit("-", 1)[0] + "_"
        totals: dict[str, float] = {}
        ends: dict[str, float] = {}
        for span in sorted(found, key=lambda span: (span.start_s, -span.end_s)):
            if span.end_s > ends.get(span.name, 0.0):
                ends[span.name] = span.end_s
                totals[prefix + span.name] = totals.get(prefix + span.name, 0.0) + span.seconds
        for name, seconds in totals.items():
            timings[f"timing_s/{name}"] = max(timings.get(f"timing_s/{name}", 0.0), seconds)
    return timings


@dataclass
class RunCheckpoints:
    """A checkpoint is each trained role's engine and the `RunState`; it appears in one rename.

    resumption: what this run goes on from, None for a fresh start. trained: groups by role instance name. models: what
    the run began from (`base_model.identities`). first_bytes: estimate of the run's first checkpoint.
    """

    store: CheckpointStore
    folder: RunFolder
    resumption: Resumption | None
    schedule: Schedule
    trained: Mapping[str, Any]
    config: dict[str, Any]
    models: dict[str, str]
    first_bytes: int
    totals: Totals = field(default_factory=Totals)

    def restore(self) -> int:
        """The step to go on with. Once every engine holds the checkpoint, what came after it is forgotten."""
        if self.resumption is None:
            self.store.set_aside_newer(None)
            return 0
        path, state = self.resumption.checkpoint.path, self.resumption.state
        with self.schedule.trainers_whole():
            gather([group.load(str(path / name)) for name, group in self.trained.items()])
            self.schedule.load_state_dict(state.schedule)
        self.totals.tokens, self.totals.seconds = state.tokens_total, state.seconds_total
        self.totals.accuracy, self.totals.accuracy_before = list(state.accuracy), state.accuracy_before
        self.folder.rewind(state.step)
        self.store.set_aside_newer(self.resumption.checkpoint)
        return state.step

    def save(self, step: int) -> None:
        with self.store.write(step, self.store.estimate_bytes() or self.first_bytes) as folder:
            for name in self.trained:
                os.makedirs(folder / name)
            with self.schedule.trainers_whole():
                gather([group.save(str(folder / name)) for name, group in self.trained.items()])
            RunState(
                step=step,
                config=self.config,
                schedule=self.schedule.state_dict(),
                versions=software_versions(),
                tokens_total=self.totals.tokens,
                seconds_total=self.totals.seconds,
                accuracy=self.totals.accuracy,
                accuracy_before=self.totals.accuracy_before,
                models=self.models,
            ).save(folder)
