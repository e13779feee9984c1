"""A training engine of which a part is frozen, on one rank, and its way into an engine."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hybridflow.batch import Batch, Ragged
from hybridflow.controller.coordinates import Coordinates, Shape
from hybridflow.resharding.incoming import expected_checksums
from hybridflow.resharding.proofs import Receipt, verify
from hybridflow.resharding.transport import RankLayout
from hybridflow.schedule.policy_sync import Route, plan_route
from tests.workers.generation.trainer import receive
from workers.training.factory import build_engine
from workers.training.settings import EngineSettings, LoraSettings

PROBE = list(range(30, 60))


@dataclass
class AdapterTrainer:
    """Trains an adapter beside a frozen model; without `lora`, all but what has one of the names in `frozen`.
    route: for all weights; its `later` for what trains alone."""

    folder: Path
    lora: LoraSettings | None
    engine: Any
    frozen: tuple[str, ...] = ()
    route: Route = field(init=False)

    def __post_init__(self) -> None:
        settings = EngineSettings(name="torch", lora=self.lora)
        self.trained: Any = build_engine(self.folder, settings, Coordinates(0, Shape()), "causal_lm", True)
        for name, parameter in self.trained.scorer.hf.named_parameters():
            if any(part in name for part in self.frozen):
                parameter.requires_grad_(False)
        source = RankLayout.here(self.trained.layout(), fixed=self.trained.fixed())
        together = tuple(frozenset(names) for names in self.engine.together())
        self.route = plan_route([source], [RankLayout.here(self.engine.layout(), together=together)], 1 << 20)

    @property
    def later(self) -> Route:
        assert self.route.later is not None
        return self.route.later

    @torch.no_grad()
    def update(self, seed: int, size: float = 0.02) -> None:
        """A random step of all that trains."""
        generator = torch.Generator().manual_seed(seed)
        for tensor in (p for p in self.trained.scorer.parameters() if p.requires_grad):
            tensor += size * torch.randn(tensor.shape, generator=generator)

    def offers(self, route: Route, store: Any = None) -> list[Any]:
        return [route.transport.offer(route.outgoing[0], self.trained.storages(), store)]

    def send(self, route: Route, version: int, **other: Any) -> Receipt:
        incoming = other.get("incoming") or list(route.incoming[0])
        return receive(self.engine, version, incoming, self.offers(route), PROBE)

    def send_in_turn(self, route: Route, version: int, store: Any) -> Receipt:
        """As a rollout rank takes a delivery: as many parts as the transport makes."""
        incoming = route.incoming[0]
        parts = route.transport.take_in_turn(incoming, self.offers(route, store), store)
        return self.engine.receive(version, incoming, parts, PROBE)

    def prove(self, route: Route, receipt: Receipt, tolerance: float = 1e-4) -> float:
        """The largest difference of a log-prob of the probe."""
        sent, logprobs = expected_checksums(route.outgoing[0], self.trained.storages()), self.logprobs(PROBE)
        verify(route.plan, sent, logprobs, [receipt], tolerance)
        return max(abs(a - b) for a, b in zip(logprobs, receipt.probe_logprobs, strict=True))

    def logprobs(self, tokens: list[int]) -> list[float]:
        row = Batch({"tokens": Ragged.from_rows([tokens], dtype=torch.int64)})
        return self.trained.forward(row, ("logprobs",), 1.0)["logprobs"].flat[1:].tolist()

    def read_back(self) -> tuple[Any, ...]:
        """Of everything, the frozen weights too."""
        return self.engine.read_back(list(self.route.incoming[0]), self.offers(self.route)).differences
