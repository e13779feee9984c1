"""New weights into a live vLLM worker, a parameter at a time.

A worker needs its own slice of each parameter only, but vLLM's loaders cut it from the full one. So the slice is put
at its place in a tensor of the full shape whose other pages are never touched, and never become memory.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from hybridflow.resharding.boxes import Box, three_axes, volume
from hybridflow.resharding.incoming import Checksums, Incoming, assemble
from hybridflow.resharding.layout import dtype_of
from hybridflow.resharding.published import Publication, mapped
from workers.generation.slices import place
from workers.generation.vllm_loaders import Load, abandon_reload, boxes_of
from workers.generation.vllm_names import checkpoint_views


def receive_stream(
    model_runner: Any,
    loads: Sequence[Load],
    shapes: Mapping[str, Sequence[int]],
    incoming: Incoming,
    publications: Sequence[Publication],
) -> dict[str, Any]:
    """Copy what this rank's part of the plan names out of the publications and load it.

    `checksums` of every move as received, and `unwritten`: the engine's own parameters that nothing reached.
    """
    checksums: Checksums = {}
    with mapped(publications) as sources:
        full = _FullShaped(shapes, boxes_of(loads, shapes))
        weights = full.stream(incoming, sources, checksums)
        unwritten = reload(model_runner, weights, _num_loaded(loads))
    return {"checksums": checksums, "unwritten": unwritten}


class _FullShaped(Mapping[str, Tensor]):
    """`assemble`'s `into`: memory for one storage after another. A slice of whole rows is filled at its place in the
    full tensor; another one is filled apart and copied there."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], boxes: Mapping[str, Sequence[Box]]) -> None:
        self._shapes, self._boxes = shapes, boxes
        self._full = torch.empty(0)
        self._dtypes: dict[str, torch.dtype] = {}

    def stream(
        self, incoming: Incoming, sources: Mapping[int, Mapping[str, Tensor]], checksums: Checksums
    ) -> Iterator[tuple[str, Tensor]]:
        """Every parameter in model order, of its full shape, this rank's slice of it filled."""
        self._dtypes = {filling.storage.name: dtype_of(filling.storage.dtype) for filling in incoming.fillings}
        assembled = assemble(incoming, sources, into=self)
        for name, shape in self._shapes.items():
            if not self._boxes[name]:  # a vocabulary's padding only
                yield name, torch.empty(tuple(shape), dtype=next(iter(self._dtypes.values())))
                continue
            found, flat, sums = next(assembled)
            assert found == name, f"{found} came in the place of {name}; the engine has checked the order"
            checksums.update(sums)
            full, self._full = self._full, torch.empty(0)
            if flat.untyped_storage().data_ptr() != full.untyped_storage().data_ptr():
                place(full, self._boxes[name], flat)
            del flat
            yield name, full
            del full

    def __getitem__(self, name: str) -> Tensor:
        shape, boxes, dtype = tuple(self._shapes[name]), self._boxes[name], self._dtypes[name]
        self._full = torch.empty(shape, dtype=dtype)
        if len(boxes) == 1 and boxes[0][0][1:] == (0, 0) and boxes[0][1][1:] == three_axes(shape)[1:]:
            return self._full[boxes[0][0][0] : boxes[0][1][0]]
        return torch.empty(sum(map(volume, boxes)), dtype=dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._dtypes)

    def __len__(self) -> int:
        return len(self._dtypes)


def _num_loaded(loads: Iterable[Load]) -> dict[str, int]:
    found: dict[str, int] = {}
    for load in loads:
        found[load.held] = found.get(load.held, 0) + prod(load.place[1])
    return found


def reload(
    model_runner: Any, weights: Iterable[tuple[str, Tensor]], num_loaded: Mapping[str, int] | None = None
) -> list[str]:
    """vLLM's reload of these full-shaped weights under Hugging Face names. Answers the engine's own parameters that
    none reached, which vLLM only logs; so its answer is caught on the way.

    num_loaded: the elements that the loaders write of each of the engine's parameters. vLLM counts them to know when a
    layer is complete, and would keep a padded one waiting, its weights in memory, until the last has come.
    """
    model: nn.Module = model_runner.get_model()
    load: Any = model.load_weights
    parameters = {name for name, _ in model.named_parameters()}
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None  # else vLLM keeps the experts' old packed weights, silently

    def declared() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if num_loaded is not None and parameter.numel() > num_loaded[name]:
                parameter.weight_loader_numel = num_loaded[name]  # type: ignore[attr-defined]
        yield from checkpoint_views(model_runner.model_config.hf_config, weights)

    written: set[str] = set()

    def recording(iterator: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = load(iterator)
        written.update(loaded or ())
        return loaded

    model.load_weights = recording  # type: ignore[assignment]
    try:
        model_runner.reload_weights(weights_iterator=declared())
    except BaseException:
        abandon_reload(model, model_runner.model_config)
        raise
    finally:
        del model.load_weights
    return sorted(parameters - written)
