"""A stand-in for training ranks: a model's parameters, cut by rows over some ranks and published by this process."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridflow.resharding.boxes import Box, three_axes
from hybridflow.resharding.incoming import Checksums, Incoming, Outgoing, expected_checksums
from hybridflow.resharding.layout import Layout, Parameter
from hybridflow.resharding.plan import Plan, make_plan, validate
from hybridflow.resharding.proofs import Receipt, verify
from hybridflow.resharding.published import Publication, publish
from hybridflow.resharding.transport import Taken
from workers.generation.slices import layout_of, merged


class Trainer:
    """model: a Hugging Face model of its own, changed by `update`."""

    def __init__(self, model: Any, num_ranks: int = 2) -> None:
        self.model = copy.deepcopy(model)
        held = self.model.state_dict()
        parameters = [Parameter(name, tuple(tensor.shape)) for name, tensor in held.items()]
        self.boxes = [
            {name: [_rows(tensor, rank, num_ranks)] for name, tensor in held.items()} for rank in range(num_ranks)
        ]
        self.layout = layout_of(parameters, self.boxes)
        self.storages: list[dict[str, Tensor]] = [
            {name: tensor[low[0] : high[0]].clone() for name, tensor in held.items() for low, high in boxes[name]}
            for boxes in self.boxes
        ]
        self.publications: list[Publication] = [publish(rank, held) for rank, held in enumerate(self.storages)]

    @torch.no_grad()
    def update(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        self.write()

    def write(self) -> None:
        """The model's parameters as they are, in the memory that was published once."""
        for name, tensor in self.weights().items():
            for boxes, storages in zip(self.boxes, self.storages, strict=True):
                ((low, high),) = boxes[name]
                storages[name].copy_(tensor[low[0] : high[0]])

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def plan(self, engine: Any) -> Plan:
        plan = make_plan(self.layout, engine.layout())
        validate(plan)
        return plan

    def expected(self, plan: Plan) -> Checksums:
        found: Checksums = {}
        for rank, storages in enumerate(self.storages):
            found |= expected_checksums(Outgoing.of(plan, rank), storages)
        return found

    def logprobs(self, tokens: Sequence[int]) -> list[float]:
        """Of `tokens[1:]`, by one plain forward pass."""
        with torch.no_grad():
            logits_TV = self.model(torch.tensor([list(tokens)])).logits[0, :-1]
        return logits_TV.double().log_softmax(-1)[torch.arange(len(tokens) - 1), list(tokens)[1:]].tolist()


@dataclass
class Delivered:
    """One transfer of a model's weights into an engine, and what it answered."""

    engine: Any
    trainer: Trainer
    plan: Plan
    receipt: Receipt

    def prove(self, logprobs: Sequence[float], tolerance: float = 1e-4) -> None:
        verify(self.plan, self.trainer.expected(self.plan), logprobs, [self.receipt], tolerance)

    def differences(self) -> tuple[Any, ...]:
        return self.engine.read_back(incoming(self.plan), self.trainer.publications).differences


def deliver(engine: Any, model: Any, version: int, probe: Sequence[int]) -> Delivered:
    """The weights of a Hugging Face model into the engine."""
    trainer = Trainer(model)
    plan = trainer.plan(engine)
    return Delivered(engine, trainer, plan, receive(engine, version, incoming(plan), trainer.publications, probe))


def receive(
    engine: Any, version: int, parts: Sequence[Incoming], publications: Sequence[Publication], probe: Sequence[int]
) -> Receipt:
    """All in one part."""
    return engine.receive(version, parts, [Taken(tuple(parts), tuple(publications))], probe)


def incoming(plan: Plan) -> list[Incoming]:
    return [Incoming.of(plan, rank) for rank in plan.destination.ranks]


def slices(layout: Layout) -> dict[tuple[int, str], list[Box]]:
    """By rank and parameter, what is held, in as few boxes as can be."""
    pieces = layout.pieces
    found: dict[tuple[int, str], list[Box]] = {}
    for rank, index, low, high in zip(
        pieces.rank.tolist(), pieces.parameter.tolist(), pieces.low.tolist(), pieces.high.tolist(), strict=True
    ):
        found.setdefault((rank, layout.parameters[index].name), []).append((tuple(low), tuple(high)))
    return {key: merged(boxes) for key, boxes in found.items()}


def _rows(tensor: Tensor, rank: int, num_ranks: int) -> Box:
    a, b, c = three_axes(tensor.shape)
    return (rank * a // num_ranks, 0, 0), ((rank + 1) * a // num_ranks, b, c)
