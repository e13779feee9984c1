"""New weights into a live vLLM worker, straight into its layers' own parameters, a layer at a time.

vLLM reloads a layer by making its parameters anew in the form of a checkpoint, filling them, packing them for the
device's kernels and copying the result to where the old ones are. Its loaders fill them from full Hugging Face
parameters; a worker is sent its own slices only, so here these are written to where the loaders would have put them
(`vllm_loaders.record_loads`). Beside its weights a worker holds one layer as loaded, and once more while it is packed.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from hybridflow.resharding.incoming import Checksums, Incoming, assemble
from hybridflow.resharding.layout import dtype_of
from workers.generation.vllm_loaders import Load, Target, abandon_reload, as_it_lies, targets_of

Sources = Mapping[int, Mapping[str, Tensor]]


class Destinations:
    """What goes where in a worker's model; worked out once. targets: by Hugging Face parameter. in_place:
    its first element in the one target's own parameter, where its storage is a part of that as it lies; else None.
    num_loaded: elements that are written of each of the engine's own parameters; what is left is padding."""

    def __init__(self, loads: Sequence[Load], shapes: Mapping[str, Sequence[int]]) -> None:
        self.targets = targets_of(loads, shapes)
        self.in_place = {name: as_it_lies(targets) for name, targets in self.targets.items()}
        self.num_loaded = dict.fromkeys((load.held for load in loads), 0)
        for target in (target for targets in self.targets.values() for target in targets):
            self.num_loaded[target.held] += prod(target.place[1])

    def layers(self, name: str) -> set[str]:
        return {_layer(target.held) for target in self.targets[name]}


def _layer(held: str) -> str:
    return held.rpartition(".")[0]


class Reload:
    """One transfer into a worker, in one or several parts: `take` each, then `finish`. After an error: `abandon`.
    names: of the parameters that come; layers that get none of them stay as they are."""

    def __init__(self, model_runner: Any, destinations: Destinations, names: Collection[str]) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._runner, self._destinations = model_runner, destinations
        self._model: nn.Module = model_runner.get_model()
        whole = destinations.targets.keys() <= set(names)
        self._awaited: dict[str, set[str]] = {_layer(held): set() for held in destinations.num_loaded} if whole else {}
        for name in (name for name in destinations.targets if name in names):
            for layer in destinations.layers(name):
                self._awaited.setdefault(layer, set()).add(name)
        self._left = set() if whole else {_layer(held) for held in destinations.num_loaded} - self._awaited.keys()
        self._open: set[str] = set()
        self._apart: set[str] = set()
        self._filled: list[str] = []
        for layer, module in self._model.named_modules():
            method: Any = getattr(module, "quant_method", None)
            if getattr(method, "moe_kernel", None) is not None and layer not in self._left:
                method.moe_kernel = None  # else vLLM keeps the experts' old packed weights, silently
        initialize_layerwise_reload(self._model)

    @torch.no_grad()
    def take(self, incoming: Incoming, sources: Sources) -> Checksums:
        """Fill what this part of the plan names; layers that are complete are packed and in use from now on."""
        checksums: Checksums = {}
        into = _Into(self, incoming)
        for name, flat, sums in assemble(incoming, sources, into=into):
            checksums |= sums
            if name in self._apart:
                for target in self._destinations.targets[name]:
                    self._held(target).copy_(flat.as_strided(target.source[1], target.source[2], target.source[0]))
            del flat
            for layer in self._destinations.layers(name):
                self._awaited[layer].remove(name)
                if not self._awaited[layer]:
                    self._filled.append(layer)
        self.pack_filled()
        return checksums

    def memory_for(self, name: str, num_elements: int, dtype: torch.dtype) -> Tensor:
        """Where a storage is to be filled: in the layer, or apart where it will be spread over it."""
        self.pack_filled()  # now that what was filled apart is gone
        for layer in self._destinations.layers(name):
            self._materialise(layer)
        found = self._destinations.in_place[name]
        held = self._parameter(self._destinations.targets[name][0].held)
        if found is None or held.dtype != dtype:
            self._apart.add(name)
            return torch.empty(num_elements, dtype=dtype, device=held.device)
        return held.view(-1)[found : found + num_elements]

    def _parameter(self, held: str) -> Tensor:
        return self._model.get_parameter(held).detach()

    def _held(self, target: Target) -> Tensor:
        offset, size, stride = target.place
        return self._parameter(target.held).as_strided(size, stride, offset)

    def _materialise(self, layer: str) -> None:
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info, materialize_layer

        if layer in self._open:
            return
        self._open.add(layer)
        module = self._model.get_submodule(layer)
        materialize_layer(module, get_layerwise_info(module))
        for kind, parameter in module.named_parameters(recurse=False):
            if self._destinations.num_loaded.get(f"{layer}.{kind}", 0) < parameter.numel():
                parameter.zero_()

    def pack_filled(self) -> None:
        from vllm.model_executor.model_loader.reload.layerwise import _layerwise_process, get_layerwise_info

        while self._filled:
            module = self._model.get_submodule(self._filled.pop(0))
            _layerwise_process(module, get_layerwise_info(module))

    @torch.no_grad()
    def finish(self) -> list[str]:
        """The engine's own parameters that nothing reached. Layers without an element to be sent (a vocabulary's
        padding only) are zero."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        for layer, awaited in self._awaited.items():
            if layer not in self._open and not awaited:
                self._materialise(layer)
                self._filled.append(layer)
        self.pack_filled()
        finalize_layerwise_reload(self._model, self._runner.model_config)
        for reset in (self._runner.reset_lora_state, self._runner.reset_encoder_cache, self._runner.reset_mm_cache):
            reset()
        names = {name for name, _ in self._model.named_parameters() if _layer(name) not in self._left}
        return sorted(name for name in names if self._awaited.get(_layer(name), {name}))

    def abandon(self) -> None:
        """Every layer that is not complete gets the tensors back that it had."""
        abandon_reload(self._model, self._runner.model_config)


class _Into(Mapping[str, Tensor]):
    """`assemble`'s `into`: each storage is looked up once, when it is about to be filled."""

    def __init__(self, reload: Reload, incoming: Incoming) -> None:
        self._reload = reload
        self._storages = {filling.storage.name: filling.storage for filling in incoming.fillings}

    def __getitem__(self, name: str) -> Tensor:
        storage = self._storages[name]
        return self._reload.memory_for(name, storage.num_elements, dtype_of(storage.dtype))

    def __iter__(self) -> Iterator[str]:
        return iter(self._storages)

    def __len__(self) -> int:
        return len(self._storages)
