"""An actor and a rollout that fail in the middle of the second sync, on one rank, as they are told to."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hybridflow.controller.dispatch import dispatch
from hybridflow.resharding.proofs import Receipt
from hybridflow.resharding.transport import Delivery
from workers import actor, rollout
from workers.generation import hf_engine


@dataclass(frozen=True)
class Fault:
    """how: `die`, `hang`, `raise` or `flip` (one bit of what was received). version: of the sync that fails."""

    how: str
    rank: int
    version: int = 2

    def strike(self) -> None:
        if self.how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "hang":
            time.sleep(600)
        if self.how == "raise":
            raise RuntimeError("out of luck")


class FaultyActor(actor.ActorWorker):
    def __init__(self, *args: Any, fault: Fault | None = None, **more: Any) -> None:
        super().__init__(*args, **more)
        self.fault, self.num_offers = fault, 0

    @dispatch("ONE_TO_ALL")
    def offer(self) -> Any:
        self.num_offers += 1
        if self.fault and self.fault.rank == self.context.coordinates.rank and self.fault.version == self.num_offers:
            self.fault.strike()
        return super().offer()

    @dispatch("ONE_TO_ALL")
    def train(self) -> None:
        """New weights, in place, the same on every rank."""
        with torch.no_grad():
            for parameter in self.engine.scorer.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))

    @dispatch("ONE_TO_ALL")
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.engine.storages().items()}


class FaultyRollout(rollout.RolloutWorker):
    def __init__(self, *args: Any, fault: Fault | None = None, **more: Any) -> None:
        super().__init__(*args, **more)
        self.fault = fault

    @dispatch("ONE_TO_ALL")
    def receive(self, delivery: Delivery) -> Receipt:
        """The fault strikes when half of the storages are written. It strikes once."""
        fault = self.fault
        if fault is None or fault.rank != self.context.coordinates.rank or fault.version != delivery.version:
            return super().receive(delivery)
        whole = hf_engine.assemble

        def broken(incoming: Any, sources: Any, **more: Any) -> Iterator[Any]:
            if fault.how == "flip" and incoming.fillings:  # on the way: the trainer holds what it held
                last = incoming.fillings[-1].moves[0].source
                flipped = sources[last.rank][last.storage].clone()
                flipped.view(torch.int32)[last.offset] ^= 1
                sources = {**sources, last.rank: {**sources[last.rank], last.storage: flipped}}
            for index, found in enumerate(whole(incoming, sources, **more)):
                if index == 5:
                    fault.strike()
                yield found

        self.fault, hf_engine.assemble = None, broken
        try:
            return super().receive(delivery)
        finally:
            hf_engine.assemble = whole

    @dispatch("ONE_TO_ALL")
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.flatten() for name, tensor in self.engine._model.state_dict().items()}
