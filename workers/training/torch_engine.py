"""Data parallelism in plain torch: the reference that other engines are tested against."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from hybridflow.batch import Batch
from hybridflow.controller.coordinates import Coordinates
from hybridflow.errors import CheckpointError
from hybridflow.loss import Loss
from hybridflow.metrics import Metrics
from hybridflow.roles import MemoryPart
from workers.training.device import join_process_group
from workers.training.engine import DataParallelEngine
from workers.training.microbatch import MicroBatch
from workers.training.modeling import ModelKind
from workers.training.offload import move_loaded_states
from workers.training.optimizer import learning_rate, make_optimizer
from workers.training.rng import load_rng, save_rng
from workers.training.settings import EngineSettings

_ALIGN = 16  # elements: views of the flat gradient start on cache lines


class TorchEngine(DataParallelEngine):
    """Every rank holds all weights. Gradients are summed over ranks in one flat float32 buffer, in a fixed order.

    Weights below float32 have float32 masters, which the optimizer steps, and gradients that accumulate in float32.
    """

    def __init__(
        self, folder: Path, settings: EngineSettings, coordinates: Coordinates, kind: ModelKind, trainable: bool = True
    ) -> None:
        super().__init__(folder, settings, coordinates, kind)
        self.trainable = trainable
        self.distributed = trainable and coordinates.shape.num_ranks > 1
        if not trainable:
            self.scorer.requires_grad_(False)
            return
        if self.distributed:
            join_process_group(coordinates, self.device)
        self.parameters = {name: p for name, p in self.scorer.named_parameters() if p.requires_grad}
        self.masters = {
            name: p if p.dtype in (torch.float32, torch.float64) else torch.nn.Parameter(p.detach().float())
            for name, p in self.parameters.items()
        }
        for name, parameter in self.parameters.items():
            if parameter is not self.masters[name]:
                parameter.register_post_accumulate_grad_hook(_move_gradient_to(self.masters[name]))
        self._attach_gradients()
        self.optimizer = make_optimizer(settings.optimizer, list(self.masters.values()))

    def _attach_gradients(self) -> None:
        """`grad` of every master is a view of one flat buffer, into which autograd accumulates in place."""
        sizes = [-(-master.numel() // _ALIGN) * _ALIGN for master in self.masters.values()]
        first = next(iter(self.masters.values()))
        self.flat_grad = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        for master, piece in zip(self.masters.values(), self.flat_grad.split(sizes), strict=True):
            master.grad = piece[: master.numel()].view_as(master)

    def _score(self, micro: MicroBatch, outputs: Sequence[str], temperature: float) -> dict[str, Tensor]:
        return self.scorer(micro.tokens_BT.to(self.device), micro.index_N.to(self.device), outputs, temperature)

    def _most(self, count: int) -> int:
        return count

    def apply(self, total: float, metrics: Sequence[Metrics]) -> Metrics:
        """See `DataParallelEngine.apply`."""
        grad_norm = float(torch.linalg.vector_norm(self.flat_grad, dtype=torch.float64))
        if not math.isfinite(grad_norm):
            raise self._refuse(total, grad_norm)
        limit = self.settings.max_grad_norm
        if limit is not None and grad_norm > limit:
            self.flat_grad.mul_(limit / (grad_norm + 1e-6))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.steps)
        self.optimizer.step()
        self._copy_masters()
        report = self._step_metrics(metrics, total, grad_norm)
        self.steps += 1
        return report

    def accumulate(self, parts: Sequence[tuple[Batch, Loss]]) -> tuple[float, list[Metrics]]:
        """See `DataParallelEngine.accumulate`. The gradient is in `flat_grad`."""
        assert self.trainable, "a frozen model cannot be trained"
        self.flat_grad.zero_()
        total, metrics = 0.0, []
        with self._dropping():
            for work in self._work(parts):
                loss, found = self._weighted_loss(work)
                loss.backward()
                total += float(loss.detach())
                metrics.append(found)
        if self.distributed:
            torch.distributed.all_reduce(self.flat_grad)
        return total, metrics

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the last `accumulate`, by parameter name (of the module tree, tied ones once)."""
        return {name: master.grad.clone() for name, master in self.masters.items() if master.grad is not None}

    @torch.no_grad()
    def _copy_masters(self) -> None:
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                self.parameters[name].copy_(master)

    def whole(self, read: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """See `DataParallelEngine.whole`."""
        return {name: tensor.detach() for name, tensor in read().items()}

    def _memory(self, part: MemoryPart) -> list[Tensor]:
        """See `DataParallelEngine._memory`. Float32 weights are their own masters."""
        if part == "weights":
            return list(self.scorer.parameters())
        if not self.trainable:
            return []
        if part == "gradients":
            return [self.flat_grad]
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*self.masters.values(), *(value for value in states if isinstance(value, Tensor))]

    def save(self, folder: Path) -> None:
        """See `TrainEngine.save`. A frozen model has nothing to save."""
        if not self.trainable:
            return
        self.refuse_offloaded("save")
        save_rng(folder, self.coordinates.rank, self.device)
        if self.coordinates.rank == 0:
            weights = {name: master.detach() for name, master in self.masters.items()}
            state = {"weights": weights, "optimizer": self.optimizer.state_dict(), "steps": self.steps}
            torch.save(state, folder / "engine.pt")

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Raises CheckpointError when the folder holds no checkpoint of this model. Any world size; a rank without
        saved RNG keeps its own."""
        if not self.trainable:
            return
        self.refuse_offloaded("load")
        if not (folder / "engine.pt").is_file():
            raise CheckpointError(f"{folder}: no engine.pt; a checkpoint of engine=torch has one")
        state = torch.load(folder / "engine.pt", map_location=self.device)
        differing = state["weights"].keys() ^ self.masters.keys()
        if differing:
            raise CheckpointError(f"{folder}: is of another model: parameters differ: {sorted(differing)[:5]}")
        for name, master in self.masters.items():
            master.copy_(state["weights"][name])
        self._copy_masters()
        self.optimizer.load_state_dict(state["optimizer"])
        move_loaded_states(self.optimizer)
        self.steps = state["steps"]
        load_rng(folder, self.coordinates.rank, self.device)


def _move_gradient_to(master: torch.nn.Parameter) -> Any:
    def hook(parameter: Tensor) -> None:
        assert master.grad is not None
        assert parameter.grad is not None
        master.grad.add_(parameter.grad)
        parameter.grad = None

    return hook
