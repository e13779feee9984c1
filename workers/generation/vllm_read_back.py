"""What a live vLLM worker computes with, read back and compared with what the trainer has published.

Linear weights are packed at load on a CPU; they are read through their kernel, applied to the identity.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hybridflow.resharding.boxes import Corner
from hybridflow.resharding.incoming import Incoming, assemble
from hybridflow.resharding.published import Publication, mapped
from workers.generation.slices import box_of, difference_box, place
from workers.generation.vllm_loaders import Load, boxes_of

Found: TypeAlias = tuple[str, Corner, Corner, float]
"""Parameter, low and high corner of what differs, and the largest absolute difference."""


def held_parameters(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """(parameter name, tensor as this rank computes with it): packed weights are read through their kernel. A
    vocabulary's weight is there twice: plain for the look-up and packed for the head."""
    for owner, submodule in model.named_modules():
        module: Any = submodule
        for kind, parameter in module.named_parameters(recurse=False):
            name = f"{owner}.{kind}"
            if parameter.numel():
                yield name, parameter.data
            if kind == "weight" and hasattr(module, "cpu_linear"):
                yield name, _through_kernel(module)


def _through_kernel(module: Any) -> Tensor:
    """(out, in) weight of a CPU linear: its kernel applied to the identity, exact because all other terms are 0."""
    sizes = (getattr(module, name, None) for name in ("input_size_per_partition", "input_size", "embedding_dim"))
    width = next(size for size in sizes if size)
    eye = torch.eye(int(width), dtype=module.weight.dtype)
    return module.cpu_linear(eye, module.weight, None).t()


def read_back(
    model: nn.Module,
    loads: Sequence[Load],
    shapes: Mapping[str, Sequence[int]],
    incoming: Incoming,
    publications: Sequence[Publication],
) -> dict[str, Any]:
    """`differences`, and `unread`: parameters of which the engine's kernels keep a form that cannot be read (experts
    packed for a CPU). One parameter at a time is in memory."""
    boxes, fillings = boxes_of(loads, shapes), {filling.storage.name: filling for filling in incoming.fillings}
    packed = set(_packed_experts(model))
    differences: list[Found] = []
    with mapped(publications) as sources:
        for held_name, held in held_parameters(model):
            if held_name in packed:
                continue
            for load in (load for load in loads if load.held == held_name and load.parameter in fillings):
                only = Incoming(incoming.rank, (fillings[load.parameter],))
                ((_, flat, _),) = assemble(only, sources)
                full = torch.empty(tuple(shapes[load.parameter]), dtype=flat.dtype)
                place(full, boxes[load.parameter], flat)
                differences += _differences(load, full, held.contiguous())
    return {
        "differences": differences,
        "unread": sorted({load.parameter for load in loads if load.held in packed}),
    }


def _differences(load: Load, full: Tensor, held: Tensor) -> Iterator[Found]:
    offset, size, stride = load.source
    at, held_size, held_stride = load.place
    wanted = full.as_strided(size, stride, offset)
    ours = held.as_strided(held_size, held_stride, at).to("cpu", wanted.dtype)
    box = box_of(full.shape, load.source)
    found = None if box is None else difference_box(box, ours, wanted)
    if found is not None:
        yield load.parameter, *found, float((ours.double() - wanted.double()).abs().max())


def _packed_experts(model: nn.Module) -> Iterator[str]:
    from vllm.platforms import current_platform

    for owner, submodule in model.named_modules():
        module: Any = submodule
        if current_platform.is_cpu() and getattr(getattr(module, "quant_method", None), "moe_kernel", None) is not None:
            yield from (f"{owner}.{kind}" for kind, _ in module.named_parameters(recurse=False))
