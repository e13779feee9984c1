"""What actor, critic and reference have in common: one training engine on each rank."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridflow.batch import Batch
from hybridflow.batch_ref import BatchRef
from hybridflow.controller.dispatch import dispatch
from hybridflow.controller.worker import Worker, WorkerContext
from hybridflow.loss import Loss
from hybridflow.metrics import Metrics
from hybridflow.resharding.cuda_ipc import EXPORTS
from hybridflow.roles import MemoryPart
from workers.training.base import TrainEngine
from workers.training.factory import ModelKind, build_engine
from workers.training.settings import EngineSettings


def update_columns(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """Columns that `update(batch, loss)` reads: the loss says which."""
    loss: Loss = args[1] if len(args) > 1 else kwargs["loss"]
    return tuple(dict.fromkeys(("tokens", "response_mask", "loss_weight", *loss.columns)))


def second_columns(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """Columns that `update_jointly(batch, loss, second, second_loss)` reads of `second`."""
    return update_columns((None, args[3] if len(args) > 3 else kwargs["second_loss"]), {})


class ModelWorker(Worker):
    """A rank that holds a model. Subclasses say of which kind and add what their role is asked."""

    kind: ModelKind = "causal_lm"
    trainable = True

    def __init__(self, context: WorkerContext, model_folder: str, settings: EngineSettings) -> None:
        super().__init__(context)
        self.engine: TrainEngine = build_engine(
            Path(model_folder), settings, context.coordinates, kind=self.kind, trainable=self.trainable
        )

    @dispatch("3D_PROTO", needs=update_columns)
    def update(self, batch: BatchRef, loss: Loss) -> Metrics:
        """One optimizer step. The engine's own metrics get the role instance's name as prefix."""
        return self._train([(batch, loss)])

    @dispatch("3D_EACH_PROTO", needs=update_columns, more_needs=(second_columns,))
    def update_jointly(self, batch: BatchRef, loss: Loss, second: BatchRef, second_loss: Loss) -> Metrics:
        """One optimizer step on the sum of two losses, each on rows of its own."""
        return self._train([(batch, loss), (second, second_loss)])

    def _train(self, parts: Sequence[tuple[BatchRef, Loss]]) -> Metrics:
        rows = [(self.fetch(batch, update_columns((batch, loss), {})), loss) for batch, loss in parts]
        metrics = self.engine.train(rows)
        return {name if "/" in name else f"{self.context.name}/{name}": m for name, m in metrics.items()}

    @dispatch("ONE_TO_ALL")
    def save(self, folder: str) -> None:
        self.engine.save(Path(folder))

    @dispatch("ONE_TO_ALL")
    def load(self, folder: str) -> None:
        self.engine.load(Path(folder))

    @dispatch("ONE_TO_ALL")
    def export(self, folder: str) -> None:
        self.engine.export(Path(folder))

    @dispatch("ONE_TO_ALL")
    def offload(self, parts: Sequence[MemoryPart]) -> None:
        """Give memory of the rank's device back between phases."""
        if "weights" in parts:
            EXPORTS.forget()
        self.engine.offload(parts)

    @dispatch("ONE_TO_ALL")
    def onload(self) -> None:
        self.engine.onload()


class LanguageModelWorker(ModelWorker):
    """Log-probs of given tokens: the actor before its update, and the reference."""

    @dispatch("3D_PROTO", needs=("tokens",))
    def logprobs(self, batch: BatchRef, temperature: float, column: str) -> Batch:
        """Writes `column`, as long as `tokens`."""
        rows = self.fetch(batch, ("tokens",))
        return Batch({column: self.engine.forward(rows, ("logprobs",), temperature)["logprobs"]})
