"""The phase change: who holds a device's memory when engines and trainers share it.

Training and generation are never on a device together, so each gives back what the other needs. From generation to
training: pause the engines, free their caches and weights (those are about to be replaced), take the trainers'
optimizer states and gradients back. From training to generation: offload these, wake the engines' weights without the
caches, bring the actor's and prove them, let the actor's own leave where configured, wake the caches, ask for the
probe's log-probs, which need them, and resume. So at no time does a device hold optimizer states or gradients and an
engine, or the weights twice and a cache.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hybridflow.controller.futures import gather
from hybridflow.metrics import Metrics
from hybridflow.roles import MemoryPart
from hybridflow.schedule.policy_sync import PolicySync
from hybridflow.spans import span

T = TypeVar("T")


@dataclass(frozen=True)
class PhaseSettings:
    """sleep: engines give weights and caches back while others train. offload: what a trained role gives back while
    engines generate, by role instance."""

    sleep: bool = False
    offload: Mapping[str, Sequence[MemoryPart]] = field(default_factory=dict)


class Phases:
    """Begins in generation. A call that asks for the phase that is on does nothing. source: the role instance among
    `trainers` whose weights the engines get."""

    def __init__(
        self,
        policy: PolicySync,
        rollout: Any,
        trainers: Mapping[str, Any],
        settings: PhaseSettings,
        source: str = "actor",
    ) -> None:
        self.policy, self.rollout, self.settings, self.source = policy, rollout, settings, source
        self._offloading = {name: trainers[name] for name, parts in settings.offload.items() if parts}
        self._training = False
        self._away = bool(self._offloading)  # as far as is known

    def train(self) -> None:
        """Trained roles hold all that is theirs; engines sleep where they are to."""
        if not self._training and self.settings.sleep:
            route = self.policy.route()  # reads layouts, of engines that must be awake for it
            with span("sleep"):
                self.rollout.pause().result()
                # What training never changes is sent once, so it must outlast the sleep.
                (self.rollout.sleep(True) if route.later else self.rollout.sleep()).result()
        self._onload()
        self._training = True

    def sync(self) -> Metrics:
        """Engines generate with the actor's weights, under the next version."""
        return self._generate(self.policy.sync)

    def restore(self, version: int) -> None:
        """Engines generate with the actor's weights, under this version, whatever they hold."""
        self.train()
        self._generate(lambda loaded: self.policy.restore(version, loaded))

    def generate(self) -> None:
        """Back to generation with the weights as they were: sent again where the engines have lost theirs."""
        if not self._training:
            return
        if self.settings.sleep:
            self._generate(self.policy.resend)
            return
        self._offload_all_but_source()
        self._offload_source()
        self._training = False

    def _generate(self, deliver: Callable[[Callable[[], None] | None], T]) -> T:
        """A transfer that fails raises, and the phase is still training: it may be tried again, or the state saved once
        `train` has brought back what has left by then."""
        self._onload()
        self._offload_all_but_source()
        if not self.settings.sleep:
            result = deliver(None)
            self._offload_source()
        else:
            with span("wake"):
                self.rollout.wake_weights().result()
            result = deliver(self._loaded)
            self.rollout.resume().result()
        self._training = False
        return result

    def _loaded(self) -> None:
        """The engines hold the weights: the actor need not."""
        self._offload_source()
        with span("wake"):
            self.rollout.wake_cache().result()

    def _onload(self) -> None:
        if self._away:
            with span("onload"):
                gather([trainer.onload() for trainer in self._offloading.values()])
        self._away = False

    def _offload_all_but_source(self) -> None:
        """All that is to leave, but for the weights that are still to be sent."""
        self._offload(lambda name, part: (name, part) != (self.source, "weights"))

    def _offload_source(self) -> None:
        self._offload(lambda name, part: (name, part) == (self.source, "weights"))

    def _offload(self, wanted: Callable[[str, MemoryPart], bool]) -> None:
        parts = {n: [part for part in self.settings.offload[n] if wanted(n, part)] for n in self._offloading}
        if any(parts.values()):
            self._away = True
            with span("offload"):
                gather([self._offloading[name].offload(found) for name, found in parts.items() if found])
