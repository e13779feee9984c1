"""DeepSpeed: ZeRO 0 to 3 over data ranks, AutoTP over tensor ranks. Gradients equal the torch engine's: summed over
data ranks and micro-batches, never averaged."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed
from torch import Tensor

from hybridflow.batch import Batch
from hybridflow.controller.coordinates import Coordinates
from hybridflow.errors import CheckpointError
from hybridflow.loss import Loss
from hybridflow.metrics import Metrics
from hybridflow.roles import MemoryPart
from workers.training.device import backend, join_process_group
from workers.training.engine import DataParallelEngine, Work
from workers.training.layout_reader import LayoutReader
from workers.training.microbatch import MicroBatch
from workers.training.modeling import ModelKind
from workers.training.offload import move_loaded_states
from workers.training.optimizer import learning_rate, make_optimizer
from workers.training.rng import load_rng, save_rng
from workers.training.settings import EngineSettings
from workers.training.tensor_parallel import TensorGroup, refuse_model, refuse_settings, tensor_parallel_config

_TAG = "deepspeed"
_MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
_GRADIENTS = ("grad_partitions_flat_buffer", "fp32_groups_gradients_flat")
"""Where DeepSpeed's optimizers keep float32 masters (ZeRO 1 and 2, ZeRO 3, ZeRO 1 with bfloat16) and gradients beyond a
step."""


def deepspeed_config(settings: EngineSettings, tensor: int = 1) -> dict[str, Any]:
    """The configuration handed to DeepSpeed: ours, with the user's `deepspeed` section merged over it key by key."""
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Without ZeRO the engine here clips: DeepSpeed would count what is on every tensor rank differently on each.
        "gradient_clipping": (settings.max_grad_norm or 0.0) if settings.zero_stage else 0.0,
        "zero_optimization": {"stage": settings.zero_stage, "reduce_scatter": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if settings.dtype == "bfloat16" and settings.zero_stage:  # a frozen model has no ZeRO, and is bfloat16 as it is
        ours["bf16"] = {"enabled": True, "check_grad_overflow": True}
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
        ours["communication_data_type"] = "fp32"
    if tensor > 1:
        ours["tensor_parallel"] = tensor_parallel_config(tensor)
    return _merged(ours, settings.deepspeed)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if nested else value
    return merged


class DeepSpeedEngine(DataParallelEngine):
    """Every rank must make the same calls, ranks of one tensor group with the same rows. A rank without rows runs idle
    micro-batches at weight zero. A frozen model is divided over tensor ranks alone."""

    cuts_tensors: ClassVar[bool] = True

    def __init__(
        self, folder: Path, settings: EngineSettings, coordinates: Coordinates, kind: ModelKind, trainable: bool = True
    ) -> None:
        tensor = coordinates.shape.tensor
        if tensor > 1:
            refuse_settings(settings, tensor)
        if not trainable:
            settings = settings.model_copy(update={"zero_stage": 0, "deepspeed": {}})
        super().__init__(folder, settings, coordinates, kind)
        if tensor > 1:
            refuse_model(self.scorer, tensor)
        import deepspeed

        join_process_group(coordinates, self.device)
        deepspeed.init_distributed(dist_backend=backend(self.device))
        self.trainable = trainable
        self.tensor_group = TensorGroup(tensor)
        if not trainable:
            self.scorer.requires_grad_(False)
        trained = [p for p in self.scorer.parameters() if p.requires_grad]
        optimizer = make_optimizer(settings.optimizer, trained) if trainable else None
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.scorer, optimizer=optimizer, config=deepspeed_config(settings, tensor), dist_init_required=False
        )

    @cached_property
    def reader(self) -> LayoutReader:
        return LayoutReader(self.scorer, self.coordinates, self.tensor_group.cuts(self.scorer))

    def _score(self, micro: MicroBatch, outputs: Sequence[str], temperature: float) -> dict[str, Tensor]:
        found = self.engine(micro.tokens_BT.to(self.device), micro.index_N.to(self.device), outputs, temperature)
        if self.settings.zero_stage < 3 or not torch.is_grad_enabled():
            return found
        # ZeRO 3 compares the modules of the ranks' backward passes. Idle ranks go through all outputs, and a loss may
        # leave some out: so each is made to depend on all.
        zero = torch.nan_to_num(torch.stack([values_N.sum() for values_N in found.values()]).sum() * 0.0)
        return {name: values_N + zero for name, values_N in found.items()}

    def _most(self, count: int) -> int:
        most = torch.tensor(count, device=self.device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        return int(most)

    def apply(self, total: float, metrics: Sequence[Metrics]) -> Metrics:
        """See `DataParallelEngine.apply`."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.steps)
        grad_norm = self._step_if_finite()
        if not math.isfinite(grad_norm):
            raise self._refuse(total, grad_norm)
        report = self._step_metrics(metrics, total, grad_norm)
        self.steps += 1
        return report

    def accumulate(self, parts: Sequence[tuple[Batch, Loss]]) -> tuple[float, list[Metrics]]:
        """See `DataParallelEngine.accumulate`. The gradient is inside DeepSpeed, in its shards."""
        rounds = self._rounds(parts)
        total, metrics = 0.0, []
        with self._dropping():
            for index, (work, idle) in enumerate(rounds):
                self.engine.set_gradient_accumulation_boundary(index == len(rounds) - 1)
                if work is not None:
                    loss, found = self._weighted_loss(work)
                    total += float(loss.detach())
                    metrics.append(found)
                else:
                    loss = self._idle_loss(idle)
                # DeepSpeed averages over data ranks; the loss's weights are global already, so ranks must only sum.
                self.engine.backward(loss * self.coordinates.shape.data, scale_wrt_gas=False)
        return total, metrics

    def _rounds(self, parts: Sequence[tuple[Batch, Loss]]) -> list[tuple[Work | None, Loss]]:
        """This rank's micro-batches with their losses, and None where it has none left while others have: all ranks
        run the same losses in the same order, each at least once."""
        rounds: list[tuple[Work | None, Loss]] = []
        for batch, loss in parts:
            work = self._work([(batch, loss)])
            count = max(1, self._most(len(work)))
            rounds += [(work[index] if index < len(work) else None, loss) for index in range(count)]
        return rounds

    def _step_if_finite(self) -> float:
        """Steps, unless the gradient norm (returned) is not finite: then the gradients are dropped.

        DeepSpeed's ZeRO optimizers do so, and clip, by themselves; without ZeRO it would step.
        """
        if self.settings.zero_stage == 0:
            gradients = {name: p.grad for name, p in self.scorer.named_parameters() if p.grad is not None}
            grad_norm, limit = self.tensor_group.norm(gradients), self.settings.max_grad_norm
            if math.isfinite(grad_norm):
                if limit is not None and grad_norm > limit:
                    torch._foreach_mul_(list(gradients.values()), limit / (grad_norm + 1e-6))
                self.engine.step()
            else:
                self.engine.zero_grad()
            return grad_norm
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the last `accumulate`, by parameter name, full on every rank."""
        from deepspeed.utils import safe_get_full_grad

        found = {name: safe_get_full_grad(p) for name, p in self.scorer.named_parameters() if p.requires_grad}
        return {
            name: self.tensor_group.whole(name, gradient).float().clone()
            for name, gradient in found.items()
            if gradient is not None
        }

    def whole(self, read: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """See `DataParallelEngine.whole`. Copies, gathered from all ranks: all of them under ZeRO 3, and what is cut
        over tensor ranks."""
        if self.settings.zero_stage < 3:
            return {name: self.tensor_group.whole(name, tensor.detach()) for name, tensor in read().items()}
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.scorer.parameters())):
            found = {name: tensor.detach() for name, tensor in read().items()}
            return {name: self.tensor_group.whole(name, tensor).clone() for name, tensor in found.items()}

    def _memory(self, part: MemoryPart) -> list[Tensor]:
        """See `DataParallelEngine._memory`. ZeRO has masters and gradients in flat buffers of its own, of which the
        parameters' are views; the names are DeepSpeed's, stage 1 and 2 have some and stage 3 others."""
        held = list(self.scorer.parameters())
        if part == "weights":
            return [*held, *(p.ds_tensor for p in held if hasattr(p, "ds_tensor"))]
        if not self.trainable:
            return []
        zero = self.engine.optimizer
        if part == "gradients":
            return [*(p.grad for p in held if p.grad is not None), *_buffers(zero, _GRADIENTS)]
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*_buffers(zero, _MASTERS), *(value for value in states if isinstance(value, Tensor))]

    def save(self, folder: Path) -> None:
        """See `TrainEngine.save`. A frozen model has nothing to save."""
        if not self.trainable:
            return
        self.refuse_offloaded("save")
        self.engine.save_checkpoint(
            str(folder), tag=_TAG, client_state={"steps": self.steps}, save_latest=False,
            exclude_frozen_parameters=self.scorer.adapter is not None,
        )  # fmt: skip
        save_rng(folder, self.coordinates.rank, self.device)
        if self.coordinates.rank == 0:
            (folder / "deepspeed.json").write_text(json.dumps(self._shape()))

    def _shape(self) -> dict[str, Any]:
        shape, settings = self.coordinates.shape, self.settings
        saved = {"zero_stage": settings.zero_stage, "ranks": shape.num_ranks, "dtype": settings.dtype}
        return {**saved, "tensor": shape.tensor} if shape.tensor > 1 else saved

    def load(self, folder: Path) -> None:
        """Same ZeRO stage, dtype and numbers of ranks as when saved; raises CheckpointError otherwise."""
        if not self.trainable:
            return
        self.refuse_offloaded("load")
        if not (folder / "deepspeed.json").is_file():
            raise CheckpointError(f"{folder}: no deepspeed.json; a checkpoint of engine=deepspeed has one")
        saved = json.loads((folder / "deepspeed.json").read_text())
        if saved != self._shape():
            raise CheckpointError(
                f"{folder}: was saved with {saved}, this run has {self._shape()}; resume with the saved values, or "
                "start from the exported model"
            )
        _, client_state = self.engine.load_checkpoint(
            str(folder), tag=_TAG, load_lr_scheduler_states=False,
            custom_load_fn=_load_what_trains if self.scorer.adapter else None,
        )  # fmt: skip
        move_loaded_states(self.optimizer)
        self.steps = client_state["steps"]
        load_rng(folder, self.coordinates.rank, self.device)


def _buffers(optimizer: Any, names: Sequence[str]) -> list[Tensor]:
    """Those of these attributes that it has: tensors, or lists of them."""
    found = [getattr(optimizer, name, None) for name in names]
    listed = [one if isinstance(one, list) else [one] for one in found]
    return [tensor for one in listed for tensor in one if tensor is not None]


def _load_what_trains(src: Mapping[str, Tensor], dst: torch.nn.Module) -> None:
    """A checkpoint beside an adapter has no frozen weights, and all others."""
    differing = src.keys() ^ dst.state_dict().keys()
    if differing:
        raise CheckpointError(f"the checkpoint is of another model: parameters differ: {sorted(differing)[:5]}")
    dst.load_state_dict(src, strict=False)
