"""What the torch and the DeepSpeed engine share: rows to micro-batches, outputs back to rows, and the weighted loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import ClassVar, get_args

import torch
from torch import Tensor

from hybridflow.batch import Batch, Ragged
from hybridflow.controller.coordinates import Coordinates
from hybridflow.errors import HybridFlowError, NonFiniteError
from hybridflow.loss import Loss, Output
from hybridflow.metrics import Metric, Metrics, merge
from hybridflow.resharding.layout import Layout
from hybridflow.roles import MemoryPart
from workers.training.device import refuse_model_parallel, training_device
from workers.training.layout_reader import LayoutReader
from workers.training.microbatch import (
    MicroBatch,
    idle_micro_batch,
    loss_inputs,
    scoring_micro_batches,
    training_micro_batches,
)
from workers.training.modeling import ModelKind, Scorer, load_scorer
from workers.training.offload import Stash, memories
from workers.training.optimizer import learning_rate
from workers.training.settings import EngineSettings

Work = tuple[MicroBatch, Batch, Loss]

WEIGHTS: tuple[MemoryPart, ...] = ("weights",)


class DataParallelEngine(ABC):
    """One rank of a model whose rows are split over data ranks. Subclasses own the optimizer and the collectives."""

    cuts_tensors: ClassVar[bool] = False
    """Whether it can divide the weights over tensor ranks."""

    def __init__(self, folder: Path, settings: EngineSettings, coordinates: Coordinates, kind: ModelKind) -> None:
        refuse_model_parallel(coordinates, settings.name, self.cuts_tensors)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        self.coordinates = coordinates
        self.device = training_device()
        self.steps = 0
        self._stashes = {part: Stash(self.device, keeps=part != "gradients") for part in get_args(MemoryPart)}
        self.scorer: Scorer = load_scorer(folder, settings, kind).to(self.device)
        if settings.compile:
            self.scorer.compile_layers()

    @abstractmethod
    def _score(self, micro: MicroBatch, outputs: Sequence[str], temperature: float) -> dict[str, Tensor]:
        """The model's outputs at the micro-batch's positions, (N,) each."""

    @abstractmethod
    def _most(self, count: int) -> int:
        """The largest of the ranks' counts where ranks must run the model equally often; else this rank's own."""

    @abstractmethod
    def accumulate(self, parts: Sequence[tuple[Batch, Loss]]) -> tuple[float, list[Metrics]]:
        """Leaves the step's global gradient (summed over ranks, not clipped) in the engine. Returns this rank's loss
        and metrics."""

    @abstractmethod
    def apply(self, total: float, metrics: Sequence[Metrics]) -> Metrics:
        """One optimizer step on what `accumulate` left, or NonFiniteError on every rank."""

    def train(self, parts: Sequence[tuple[Batch, Loss]]) -> Metrics:
        """See `TrainEngine.train`."""
        self.refuse_offloaded("train")
        return self.apply(*self.accumulate(parts))

    @torch.no_grad()
    def forward(self, batch: Batch, outputs: Sequence[Output], temperature: float) -> dict[str, Ragged]:
        """See `TrainEngine.forward`."""
        self.refuse_offloaded("forward", WEIGHTS)
        self.scorer.check(outputs)
        tokens = batch.ragged("tokens")
        count = tokens.flat.shape[0]
        flats = {name: torch.zeros((count, *self.trailing(name)), dtype=torch.float32) for name in outputs}
        micro_batches = scoring_micro_batches(batch, self.settings.tokens_per_micro_batch)
        rounds = self._most(len(micro_batches))  # before the first: ranks' collectives must come in one order
        for micro in micro_batches:
            found = self._score(micro, outputs, temperature)
            slots_BT = tokens.offsets[micro.rows_B][:, None] + torch.arange(micro.tokens_BT.shape[1])
            for name in outputs:
                flats[name][slots_BT[micro.mask_BT]] = found[name].float().cpu()
        for _ in range(rounds - len(micro_batches)):
            self._score(idle_micro_batch(), outputs, temperature)
        return {name: Ragged(flat, tokens.lengths) for name, flat in flats.items()}

    def reference_forward(self, batch: Batch, outputs: Sequence[Output], temperature: float) -> dict[str, Ragged]:
        """See `TrainEngine.reference_forward`."""
        if self.scorer.adapter is None:
            raise HybridFlowError(
                "training: this model trains all its weights, so the policy before training is gone; only an engine "
                "with lora can score with it. Give the reference a worker of its own"
            )
        with self.scorer.adapter.reference():
            return self.forward(batch, outputs, temperature)

    def _dropping(self) -> AbstractContextManager[None]:
        """Around forward and backward passes of an optimizer step: dropout, where the adapter has any."""
        adapter = self.scorer.adapter
        return adapter.dropping(self.steps, self.coordinates.rank) if adapter else nullcontext()

    def trailing(self, output: Output) -> tuple[int, ...]:
        """See `TrainEngine.trailing`."""
        return self.scorer.trailing(output)

    def _work(self, parts: Sequence[tuple[Batch, Loss]]) -> list[Work]:
        budget = self.settings.tokens_per_micro_batch
        work: list[Work] = []
        for batch, loss in parts:
            self.scorer.check(loss.outputs)
            work += [(micro, batch, loss) for micro in training_micro_batches(batch, loss, budget)]
        return work

    def _weighted_loss(self, work: Work) -> tuple[Tensor, Metrics]:
        """sum over trainable tokens of `loss_weight * loss`, in float64, with its graph; and the loss's metrics."""
        micro, batch, loss = work
        outputs_N = self._score(micro, loss.outputs, loss.temperature)
        inputs = loss_inputs(micro, batch, loss, outputs_N, self.device)
        loss_BT, metrics = loss(inputs)
        if loss_BT.shape != inputs.mask_BT.shape:
            raise HybridFlowError(
                f"{type(loss).__name__}: returned shape {tuple(loss_BT.shape)}; one number a token is "
                f"{tuple(inputs.mask_BT.shape)}"
            )
        weights_N = inputs.weight_B.double()[:, None].expand(inputs.mask_BT.shape)[inputs.mask_BT]
        total = (loss_BT[inputs.mask_BT].double() * weights_N).sum()
        if not bool(torch.isfinite(total.detach())):
            total = total * float("nan")  # poisons the gradient, so that every rank sees it in the norm
        return total, metrics

    def _idle_loss(self, loss: Loss) -> Tensor:
        """Zero, through all of the model that the loss reads."""
        found = self._score(idle_micro_batch(), loss.outputs, loss.temperature)
        return torch.stack([values_N.sum() for values_N in found.values()]).sum() * 0.0

    def _step_metrics(self, parts: Sequence[Metrics], total: float, grad_norm: float) -> Metrics:
        own = {
            "loss": Metric(total, 1.0, "sum"),
            "grad_norm": Metric(grad_norm),
            "lr": Metric(learning_rate(self.settings, self.steps)),
        }
        return {**merge(parts), **own}

    def _refuse(self, total: float, grad_norm: float) -> NonFiniteError:
        return NonFiniteError(
            f"optimizer step {self.steps}: loss {total} on rank {self.coordinates.rank}, gradient norm {grad_norm}: not"
            " finite. Weights and optimizer are as before the step. Look at the batch's advantages and log-probs, "
            "lower the learning rate, or clip harder"
        )

    @abstractmethod
    def whole(self, read: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What `read` returns of the live weights, every tensor whole on every rank, without gradients."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """See `TrainEngine.state_dict`. Live weights, not copies, but for those that an adapter is merged into."""
        self.refuse_offloaded("state_dict", WEIGHTS)
        return self.whole(self.scorer.weights)

    @cached_property
    def reader(self) -> LayoutReader:
        return LayoutReader(self.scorer, self.coordinates)

    def layout(self) -> Layout:
        """See `TrainEngine.layout`."""
        return self.reader.layout()

    def fixed(self) -> frozenset[str]:
        """See `TrainEngine.fixed`."""
        return self.reader.fixed()

    def storages(self) -> Mapping[str, Tensor]:
        """See `TrainEngine.storages`."""
        self.refuse_offloaded("storages", WEIGHTS)
        return self.reader.storages()

    @abstractmethod
    def _memory(self, part: MemoryPart) -> list[Tensor]:
        """Tensors on the memory of this part; the optimizer's may hold memory of the weights as well."""

    def offload(self, parts: Collection[MemoryPart]) -> None:
        """See `TrainEngine.offload`."""
        if "weights" in parts and self.device.type == "cpu":
            raise HybridFlowError(
                "offload: weights in the host's memory stay: the engines map them there. Leave `weights` out of "
                "schedule.offload for roles without a GPU"
            )
        kept = {memory.data_ptr() for memory in memories(self._memory("weights"))}
        for part in sorted(parts):  # weights last: the optimizer's are told apart from them
            tensors = self._memory(part)
            if part != "weights":
                tensors = [tensor for tensor in tensors if tensor.untyped_storage().data_ptr() not in kept]
            self._stashes[part].put(tensors)

    def onload(self) -> None:
        """See `TrainEngine.onload`."""
        for stash in self._stashes.values():
            stash.take_back()

    def refuse_offloaded(self, work: str, parts: Collection[MemoryPart] = get_args(MemoryPart)) -> None:
        away = [part for part in parts if self._stashes[part].num_bytes]
        if away:
            raise HybridFlowError(
                f"training: {work} needs the {' and '.join(away)} of rank {self.coordinates.rank}, which are "
                "offloaded: call onload first, or leave them out of schedule.offload"
            )

    def export(self, folder: Path) -> None:
        """See `TrainEngine.export`."""
        state, adapter = self.state_dict(), self.whole(self.scorer.adapter_weights)
        if self.coordinates.rank == 0:
            self.scorer.export(folder, state, adapter)
