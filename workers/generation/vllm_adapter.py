"""The actor's adapter in a live vLLM worker: vLLM's own LoRA layers add it to what the frozen weights give.

Which slice of A and B a tensor rank holds is learnt from the layers' own methods, as that of a weight is from the
model's loaders. It is written where the layers read it: slot 0 of their stacked tensors, which is the only one. vLLM's
way is a file that every worker reads whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridflow.errors import WeightSyncError
from hybridflow.resharding.boxes import Box
from hybridflow.resharding.incoming import Checksums, Incoming, assemble
from workers.generation.adapter import ServedAdapter
from workers.generation.slices import box_of, difference_box, view_of
from workers.training.lora import part_names

NUMBER = 1
"""vLLM's number of the adapter; 0 is the model without one."""


@dataclass(frozen=True)
class Place:
    """A or B of one layer: the box of it that this rank holds, as (rows, columns) of the layer's own memory. factor:
    what it is multiplied by there; vLLM's layers know no scale."""

    parameter: str
    box: Box
    held: Tensor
    factor: float

    def read(self, flat: Tensor) -> Tensor:
        """What is to be held when this came."""
        tensor = flat.view(self.held.shape).to(self.held.device)
        return tensor if self.factor == 1 else tensor * self.factor


def serve(model_runner: Any, adapter: ServedAdapter) -> list[Place]:
    """The adapter's places in the worker's layers; it adds nothing before they are written."""
    from vllm.platforms import current_platform

    manager = model_runner.lora_manager._adapter_manager
    found: list[Place] = []
    for name, module in manager.modules.items():
        found += _places(name, module, manager.packed_modules_mapping, adapter)
        if current_platform.is_cpu():
            module.set_mapping(OneAdapter())
    missing = sorted(adapter.shapes.keys() - {place.parameter for place in found})
    if missing:
        raise WeightSyncError(
            f"rollout: vLLM has no LoRA layer for {', '.join(missing[:5])}{' and more' if missing[5:] else ''}; leave "
            "those modules out of actor.engine.lora.target_modules, or set rollout=hf"
        )
    register(model_runner)
    return found


def register(model_runner: Any) -> None:
    """Make vLLM believe that it has loaded the adapter; a reload of the model's weights makes it forget. What the slot
    holds stays: vLLM's own way writes to it, and keeps tensors of all layers beside it."""
    from vllm.lora.lora_model import LoRAModel

    manager = model_runner.lora_manager._adapter_manager
    manager._registered_adapters[NUMBER] = LoRAModel(NUMBER, manager.lora_config.max_lora_rank, {})
    manager._active_adapters[NUMBER] = None
    manager.lora_index_to_id = [NUMBER]
    manager._last_mapping = None


def clear(model_runner: Any) -> None:
    """Zero in the slot, also where the adapter's rank leaves room."""
    for module in model_runner.lora_manager._adapter_manager.modules.values():
        module.reset_lora(0)


def _places(name: str, module: Any, packed: Mapping[str, Sequence[str]], adapter: ServedAdapter) -> Iterator[Place]:
    """One vLLM layer may hold several of the model's (q, k and v in one), each in a slice of its own."""
    owner, _, last = name.rpartition(".")
    layers = [f"{owner}.{part}" for part in packed.get(last, [last])]
    known = [layer for layer in layers if layer in adapter.layers]
    wholes = {
        layer: [torch.empty(adapter.shapes[part], device="meta") for part in part_names(layer)] for layer in known
    }
    for kind, stacked, cut, factor in (
        (0, module.lora_a_stacked, module.slice_lora_a, 1.0),
        (1, module.lora_b_stacked, module.slice_lora_b, adapter.scale),
    ):
        given = [wholes[layer][kind] if layer in wholes else None for layer in layers]
        if len(layers) == 1:
            cuts = [cut(given[0])] if known else [None]
        else:
            cuts = cut(given)
        if len(cuts) != len(stacked):
            raise WeightSyncError(f"rollout: vLLM's {name} has {len(stacked)} adapters for {', '.join(layers)}")
        for layer, whole, part, memory in zip(layers, given, cuts, stacked, strict=True):
            if whole is None or part is None:
                continue
            box = box_of(whole.shape, view_of(part)) if _is_view(part, whole) else None
            if box is None:
                raise WeightSyncError(f"rollout: vLLM's {name} cuts {part_names(layer)[kind]} in a way not planned for")
            rows, columns = part.shape
            yield Place(part_names(layer)[kind], box, memory[0, 0, :rows, :columns], factor)


def _is_view(part: Tensor, whole: Tensor) -> bool:
    return part.untyped_storage()._cdata == whole.untyped_storage()._cdata


def write(places: Sequence[Place], incoming: Incoming, sources: Mapping[int, Mapping[str, Tensor]]) -> Checksums:
    """Fill the places with this rank's part of the plan, which names each of them."""
    by_name = {place.parameter: place for place in places}
    checksums: Checksums = {}
    for name, flat, sums in assemble(incoming, sources):
        by_name[name].held.copy_(by_name[name].read(flat))
        checksums.update(sums)
    return checksums


def compare(
    places: Sequence[Place], incoming: Incoming, sources: Mapping[int, Mapping[str, Tensor]]
) -> Iterator[tuple[str, Any, Any, float]]:
    """Parameter, low and high corner of what differs, and the largest difference."""
    by_name = {place.parameter: place for place in places}
    for name, flat, _ in assemble(incoming, sources):
        place = by_name[name]
        ours, wanted = place.held.cpu(), place.read(flat).cpu()
        box = difference_box(place.box, ours, wanted)
        if box is not None:
            yield name, *box, float((ours.double() - wanted.double()).abs().max()) / place.factor


class OneAdapter:
    """For a CPU: what vLLM's layers ask, when every request has the one adapter. vLLM's own copies A and B once for
    every token before it multiplies."""

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Sequence[Tensor],
        lora_b_stacked: Sequence[Tensor],
        scale: float,
        output_slices: Sequence[int],
        **_: Any,
    ) -> None:
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        start = 0
        for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            y[:, start : start + size] += (x @ a[0, 0].T) @ b[0, 0].T * scale
            start += size
