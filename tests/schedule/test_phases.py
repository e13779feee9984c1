"""The order of the phase change, recorded; and that it is left out where nothing is to be given back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from hybridflow.errors import WeightSyncError
from hybridflow.metrics import Metric, Metrics
from hybridflow.schedule.phases import Phases, PhaseSettings
from hybridflow.schedule.sync import SyncSchedule

Call = tuple[Any, ...]


@dataclass
class Done:
    value: Any = None

    def result(self) -> Any:
        return self.value


@dataclass
class Recorded:
    """A group whose every call is written down."""

    name: str
    calls: list[Call]

    def __getattr__(self, method: str) -> Callable[..., Done]:
        def call(*arguments: Any) -> Done:
            self.calls.append((f"{self.name}.{method}", *arguments))
            return Done()

        return call


@dataclass
class Policy:
    """Delivers in the order of `PolicySync`: in place, then `loaded`, then the log-probs."""

    calls: list[Call]
    version: int = 0
    fails: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)
    later: Any = None

    def route(self) -> SimpleNamespace:
        self.calls.append(("route",))
        return SimpleNamespace(later=self.later)

    def sync(self, loaded: Callable[[], None] | None = None) -> Metrics:
        self._deliver(self.version + 1, loaded)
        return {"sync/version": Metric(self.version)}

    def restore(self, version: int, loaded: Callable[[], None] | None = None) -> None:
        self._deliver(version, loaded)

    def resend(self, loaded: Callable[[], None] | None = None) -> None:
        self.calls.append(("resend",))
        self._deliver(self.version, loaded)

    def _deliver(self, version: int, loaded: Callable[[], None] | None) -> None:
        self.calls.append(("deliver", version))
        if self.fails:
            raise WeightSyncError(self.fails.pop())
        if loaded:
            loaded()
            self.calls.append(("probe",))
        if self.unproven:
            raise WeightSyncError(self.unproven.pop())
        self.version = version


def phases(settings: PhaseSettings) -> tuple[Phases, list[Call]]:
    calls: list[Call] = []
    roles = {name: Recorded(name, calls) for name in ("actor", "critic")}
    return Phases(Policy(calls), Recorded("rollout", calls), roles, settings), calls


ALL = PhaseSettings(
    sleep=True, offload={"actor": ("gradients", "optimizer", "weights"), "critic": ("optimizer", "weights")}
)
TO_TRAINING: list[Call] = [
    ("route",),
    ("rollout.pause",),
    ("rollout.sleep",),
    ("actor.onload",),
    ("critic.onload",),
]


def to_generation(version: int) -> list[Call]:
    return [
        ("actor.offload", ["gradients", "optimizer"]),
        ("critic.offload", ["optimizer", "weights"]),
        ("rollout.wake_weights",),
        ("deliver", version),
        ("actor.offload", ["weights"]),
        ("rollout.wake_cache",),
        ("probe",),
        ("rollout.resume",),
    ]


def test_a_step_gives_back_before_it_takes() -> None:
    made, calls = phases(ALL)
    made.train()
    assert calls == TO_TRAINING
    calls.clear()
    assert made.sync()["sync/version"].value == 1
    assert calls == to_generation(1)


def test_engines_keep_weights_that_are_sent_once_only() -> None:
    made, calls = phases(ALL)
    made.policy.later = "the adapter's route"
    made.train()
    assert calls[:3] == [("route",), ("rollout.pause",), ("rollout.sleep", True)]


def test_a_phase_that_is_on_is_not_entered_again() -> None:
    made, calls = phases(ALL)
    made.generate()
    assert calls == []
    made.train()
    made.train()
    assert calls == TO_TRAINING


def test_weights_that_an_engine_lost_come_again_under_their_version() -> None:
    """After a checkpoint, or a step that changed nothing."""
    made, calls = phases(ALL)
    made.policy.version = 5
    made.train()
    calls.clear()
    made.generate()
    again = to_generation(5)
    assert calls == [*again[:3], ("resend",), *again[3:]]
    assert made.policy.version == 5


def test_a_restore_goes_through_both_phases() -> None:
    made, calls = phases(ALL)
    made.restore(3)
    assert calls == TO_TRAINING + to_generation(3)


def test_a_transfer_that_fails_leaves_the_engines_paused_and_may_be_tried_again() -> None:
    made, calls = phases(ALL)
    made.policy.fails = ["engine 1 did not answer"]
    made.train()
    calls.clear()
    with pytest.raises(WeightSyncError):
        made.sync()
    assert calls == to_generation(1)[:4]
    calls.clear()
    made.sync()
    assert calls == TO_TRAINING[-2:] + to_generation(1)


def test_after_a_proof_that_fails_last_all_is_brought_back_before_anything_else() -> None:
    """By then the actor's weights have left too: neither a new transfer nor a checkpoint can do without them."""
    for then, begins in (("sync", TO_TRAINING[-2:] + to_generation(1)), ("train", TO_TRAINING[-2:])):
        made, calls = phases(ALL)
        made.policy.unproven = ["the probe differs"]
        made.train()
        with pytest.raises(WeightSyncError):
            made.sync()
        calls.clear()
        getattr(made, then)()
        assert calls == begins


def test_at_the_end_engines_are_not_woken_again() -> None:
    made, calls = phases(ALL)
    nothing: Any = None
    SyncSchedule(nothing, nothing, nothing, nothing, made, nothing).finish()
    assert calls == TO_TRAINING


def test_engines_that_stay_awake_are_left_alone() -> None:
    """A CPU, or pools of their own: no call but the transfer's, and none at all where nothing is offloaded."""
    made, calls = phases(PhaseSettings())
    made.train()
    made.sync()
    made.train()
    made.generate()
    assert calls == [("deliver", 1)]
    made, calls = phases(PhaseSettings(offload={"actor": ("optimizer", "weights"), "critic": ()}))
    made.train()
    made.sync()
    offloads: list[Call] = [("actor.offload", ["optimizer"]), ("actor.offload", ["weights"])]
    assert calls == [("actor.onload",), offloads[0], ("deliver", 1), offloads[1]]
    calls.clear()
    made.train()
    made.generate()
    assert calls == [("actor.onload",), *offloads]
