"""LoRA (2106.09685) by peft: a low-rank adapter beside the linear layers of a frozen model.

A layer computes W x + (alpha / rank) B A x; A and B train, W never changes. B begins at 0, so that an adapter changes
nothing before it is trained.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hybridflow.errors import ConfigError, did_you_mean
from workers.training.settings import LoraSettings

WEIGHTS_FILE = "adapter_model.safetensors"
ACTIVE, START = "default", "start"
"""peft's names of the adapter that trains, and of the frozen one that it began as (only with `init_from`)."""
_PARTS = ("lora_A", "lora_B")


class Adapter:
    """The adapter of one model, and what can be asked of it. Nothing here writes to the model's own weights."""

    def __init__(self, hf: PreTrainedModel, settings: LoraSettings, base: Path, task: str) -> None:
        """Freezes `hf`, whose folder is `base`, and puts the adapter in. task: peft's name of what the model is for.
        Raises ConfigError."""
        self.settings = settings
        self.scale = settings.alpha / settings.rank
        transposed = any(isinstance(module, Conv1D) for module in hf.modules())
        self.config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=target_modules(hf, settings),
            fan_in_fan_out=transposed,
            task_type=task,
            base_model_name_or_path=str(base),
        )
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            inject_adapter_in_model(self.config, hf)
        self.layers: dict[str, Any] = {n: module for n, module in hf.named_modules() if isinstance(module, LoraLayer)}
        for layer in self.layers.values():
            layer.eval()
        if settings.init_from is not None:
            self._begin_as(Path(settings.init_from))

    @torch.no_grad()
    def _begin_as(self, folder: Path) -> None:
        """Loads the adapter in `folder`, and keeps a frozen copy: with it the model is the policy before training."""
        if problems := self.settings.problems():
            raise ConfigError("\n".join(f"lora.{line}" for line in problems))
        if not (folder / WEIGHTS_FILE).is_file():
            raise ConfigError(f"lora.init_from: {folder} has no {WEIGHTS_FILE}; save it as safetensors, as peft does")
        saved, own = load_file(folder / WEIGHTS_FILE), self.tensors()
        if saved.keys() != own.keys():
            there, here = (sorted({_module_name(tensor) for tensor in names}) for names in (saved, own))
            raise ConfigError(
                f"lora.init_from: the adapter in {folder} is on {there}, and lora.target_modules makes {here}; on one "
                f"side only is, first, {sorted(saved.keys() ^ own.keys())[0]}. Set the target_modules of its "
                "adapter_config.json, and use it for a model of its kind (a critic has other names than a policy)"
            )
        for name, tensor in own.items():
            tensor.copy_(saved[name])
        for layer in self.layers.values():
            layer.lora_dropout[START] = nn.Identity()
            layer.scaling[START] = 0.0
            for part in _PARTS:
                getattr(layer, part)[START] = copy.deepcopy(getattr(layer, part)[ACTIVE])
            layer.set_adapter([ACTIVE, START])
            for part in _PARTS:
                getattr(layer, part)[START].requires_grad_(False)

    def tensors(self) -> dict[str, Tensor]:
        """The live A and B of every layer under the names of peft's files."""
        return {
            f"base_model.model.{name}.{part}.weight": getattr(layer, part)[ACTIVE].weight
            for name, layer in self.layers.items()
            for part in _PARTS
        }

    def named(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` of the whole model, whose weights have plain names, and after them every A and B under the name of
        its layer (`part_names`). A frozen copy of the adapter is left out."""
        found = {name: tensor for name, (tensor, _) in self.plain(state).items()}
        for name, layer in self.layers.items():
            parts = (getattr(layer, part)[ACTIVE].weight for part in _PARTS)
            found |= dict(zip(part_names(name), parts, strict=True))
        return found

    @torch.no_grad()
    def merged(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` of the whole model as a model without an adapter has it: plain names, and W + scale B A, summed in
        float32 at least, in new tensors. All other tensors are those of `state`."""
        return {
            name: tensor if layer is None else self.with_delta(layer, tensor)
            for name, (tensor, layer) in self.plain(state).items()
        }

    def plain(self, state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Any]]:
        """`state` without the adapter, under plain names, each tensor with the layer whose B A is to be added to it."""
        plain: dict[str, tuple[Tensor, Any]] = {}
        for name, tensor in state.items():
            owner, _, leaf = name.partition(".base_layer.")
            if owner in self.layers:
                plain[f"{owner}.{leaf}"] = tensor, self.layers[owner] if leaf == "weight" else None
            elif name.partition(".lora_")[0] not in self.layers:
                plain[name] = tensor, None
        return plain

    def with_delta(self, layer: Any, weight: Tensor) -> Tensor:
        """W + scale B A in a new tensor, summed in float32 at least."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = layer.lora_B[ACTIVE].weight.to(wide) @ layer.lora_A[ACTIVE].weight.to(wide) * self.scale
        return (weight.to(wide) + (delta.T if layer.fan_in_fan_out else delta)).to(weight.dtype)

    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """peft's format: `peft.PeftModel.from_pretrained(base_model, folder)` reads it. `tensors`: as by `tensors()`,
        whole."""
        self.config.save_pretrained(str(folder))
        kept = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        save_file(kept, folder / WEIGHTS_FILE, {"format": "pt"})

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The policy before training: the adapter off, or as it was in `init_from`.

        By its scale, not by peft's switch: what is added is exactly 0, and every module runs in the order that
        DeepSpeed's prefetching (ZeRO 3) has learnt.
        """
        self._set_scales(active=0.0, start=self.scale)
        try:
            yield
        finally:
            self._set_scales(active=self.scale, start=0.0)

    def _set_scales(self, active: float, start: float) -> None:
        for layer in self.layers.values():
            layer.scaling[ACTIVE] = active
            if START in layer.scaling:
                layer.scaling[START] = start

    @contextmanager
    def dropping(self, step: int, rank: int) -> Iterator[None]:
        """Dropout on, where there is any, with masks that are a function of the settings' seed, step and rank."""
        if not self.settings.dropout:
            yield
            return
        dropouts = [layer.lora_dropout[ACTIVE] for layer in self.layers.values()]
        with torch.random.fork_rng():
            torch.manual_seed(((self.settings.seed << 40) + (step << 16) + rank) % 2**63)
            for dropout in dropouts:
                dropout.train()
            try:
                yield
            finally:
                for dropout in dropouts:
                    dropout.eval()


def target_modules(hf: PreTrainedModel, settings: LoraSettings) -> list[str]:
    """Names for peft, which takes every module that is called so or ends so. Raises ConfigError for one that no linear
    layer has. The output head is left out: log-probs are computed from its weight alone."""
    head = hf.get_output_embeddings()
    linear = {n for n, module in hf.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head}
    last = {name.rpartition(".")[2] for name in linear}
    if settings.target_modules == "all-linear":
        others = {name.rpartition(".")[2] for name, _ in hf.named_modules() if name not in linear}
        return sorted(linear if last & others else last)
    for wanted in settings.target_modules:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in linear):
            raise ConfigError(
                f"lora.target_modules: found {wanted!r}, which no linear layer of {type(hf).__name__} is called; there "
                f"are {', '.join(sorted(last))}{did_you_mean(wanted, sorted(last))}"
            )
    return list(settings.target_modules)


def part_names(layer: str) -> tuple[str, str]:
    """Of A and B, as layouts of trainers and engines have them."""
    return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"


def _module_name(tensor: str) -> str:
    """`base_model.model.model.layers.0.mlp.up_proj.lora_A.weight` -> `up_proj`."""
    return tensor.split(".")[-3]
