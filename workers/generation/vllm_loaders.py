"""Learns from a live vLLM worker which slice of every Hugging Face parameter it loads, and to where.

Linear weights are packed at load on a CPU, so shapes cannot be read; but the model's own `load_weights`, driven with
tensors that have a shape and no memory, narrows each to the slice it wants before it copies. vLLM's `sharded_rdt`
engine learns so too. Here the copies are seen by a dispatch mode, so every loader that only takes views is understood.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hybridflow.errors import WeightSyncError
from hybridflow.resharding.boxes import Box
from workers.generation.slices import View, box_of, in_storage, merged, view_of
from workers.generation.vllm_names import checkpoint_views

NEVER = 2**62
"""As `weight_loader_numel`: vLLM believes that elements are still missing, and does not process the layer."""


@dataclass(frozen=True)
class Load:
    """One copy of a loader: `source` of the Hugging Face parameter to `place` of the engine's own parameter."""

    parameter: str
    source: View
    held: str
    place: View


@dataclass(frozen=True)
class Target:
    """A load as this rank's own storage of the parameter sees it: `source` of the storage to `place` of `held`."""

    held: str
    source: View
    place: View


class _Recorder(TorchDispatchMode):
    """Notes every copy out of the given parameters and carries none out."""

    def __init__(self, parameters: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._parameters = {_memory(tensor): name for name, tensor in parameters.items()}
        self._held = {_memory(tensor): name for name, tensor in held.items()}
        self.loads: list[Load] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default or not args[1].is_meta:
            return func(*args, **(kwargs or {}))
        target, source = args[:2]
        name, held = self._parameters.get(_memory(source)), self._held.get(_memory(target))
        if name is None or held is None or target.shape != source.shape:
            raise WeightSyncError(
                f"rollout.layout: vLLM's loader of {held or 'an unnamed tensor'} copies {tuple(source.shape)} of "
                f"{name or 'a tensor that it computed'} to {tuple(target.shape)}; only plain slices can be planned"
            )
        self.loads.append(Load(name, view_of(source), held, view_of(target)))
        return target


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@torch.no_grad()
def record_loads(model: nn.Module, config: Any, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> list[Load]:
    """Every copy that `model.load_weights` makes of parameters of these shapes. The model keeps its weights.

    config: vLLM's ModelConfig. Raises WeightSyncError where a loader does more than to slice and copy.
    """
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    parameters = {name: torch.empty(tuple(shape), dtype=dtype, device="meta") for name, shape in shapes.items()}
    initialize_layerwise_reload(model)
    targets = dict(model.named_parameters(remove_duplicate=False))
    try:
        for target in targets.values():
            target.weight_loader_numel = NEVER  # type: ignore[attr-defined]
        with _Recorder(parameters, targets) as recorder:
            model.load_weights(checkpoint_views(config.hf_config, parameters.items()))  # type: ignore[operator]
    finally:
        for target in targets.values():
            del target.weight_loader_numel  # type: ignore[attr-defined] # vLLM keeps these objects for the next reload
        abandon_reload(model, config)
    return recorder.loads


def abandon_reload(model: nn.Module, config: Any) -> None:
    """End a reload without loading what it still waits for: every layer gets the tensors back that it had. Without
    this the next reload would count what the failed one has already collected."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            info.load_numel, info.load_numel_total = 0, 0
            info.loaded_weights.clear()
    finalize_layerwise_reload(model, config)


def boxes_of(loads: Sequence[Load], shapes: Mapping[str, Sequence[int]]) -> dict[str, list[Box]]:
    """By parameter, the boxes that the loads read, as few as can be. Parameters that nothing reads have none."""
    found: dict[str, list[Box]] = {name: [] for name in shapes}
    for load in loads:
        try:
            box = box_of(shapes[load.parameter], load.source)
        except ValueError as error:
            raise WeightSyncError(f"rollout.layout: {load.parameter} for {load.held}: {error}") from error
        if box is not None:
            found[load.parameter].append(box)
    return {name: merged(boxes) for name, boxes in found.items()}


def loaded_together(loads: Sequence[Load]) -> list[list[str]]:
    """Parameters that go into one layer: vLLM's reload writes a layer whole, or leaves it as it is."""
    found: dict[str, dict[str, None]] = {}
    for load in loads:
        found.setdefault(load.held.rpartition(".")[0], {})[load.parameter] = None
    return [list(names) for names in found.values()]


def unloaded(model: nn.Module, loads: Sequence[Load]) -> Iterator[str]:
    """The engine's own parameters that no load writes."""
    written = {load.held for load in loads}
    return (name for name, _ in model.named_parameters(remove_duplicate=False) if name not in written)


def targets_of(loads: Iterable[Load], shapes: Mapping[str, Sequence[int]]) -> dict[str, list[Target]]:
    """By parameter, where its storage goes; loads of no element are left out."""
    loads = [load for load in loads if prod(load.source[1])]
    boxes = boxes_of(loads, shapes)
    found: dict[str, list[Target]] = {}
    for load in loads:
        source = in_storage(shapes[load.parameter], boxes[load.parameter], load.source)
        found.setdefault(load.parameter, []).append(Target(load.held, source, load.place))
    return found


def as_it_lies(targets: Sequence[Target]) -> int | None:
    """The storage's first element in the engine's own parameter, where it is a part of that as it is; None where it is
    spread over it, or goes to several."""
    where = {(target.held, target.place[0] - target.source[0]) for target in targets}
    same = all(
        step == other
        for target in targets
        for size, step, other in zip(target.source[1], target.source[2], target.place[2], strict=True)
        if size > 1
    )
    return where.pop()[1] if same and len(where) == 1 else None
