"""The adapter that an engine serves beside the frozen weights: which layers have an A and a B, and of which shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from workers.training.lora import Adapter, part_names
from workers.training.settings import LoraSettings


@dataclass(frozen=True)
class ServedAdapter:
    """layers: (inputs, outputs) of each adapted linear layer by its Hugging Face name. A layer's output has
    scale B A x added to it."""

    rank: int
    scale: float
    layers: Mapping[str, tuple[int, int]]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of every A and B, under the names that the trainer's layout has for them."""
        found = {}
        for layer, (inputs, outputs) in self.layers.items():
            name_a, name_b = part_names(layer)
            found[name_a], found[name_b] = (self.rank, inputs), (outputs, self.rank)
        return found

    @staticmethod
    def of(folder: Path, settings: LoraSettings) -> "ServedAdapter":
        """What training with these settings puts beside the model of this folder. Allocates nothing."""
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
            adapter = Adapter(model, served_settings(settings), folder, "CAUSAL_LM")
        layers = {name: (layer.in_features, layer.out_features) for name, layer in adapter.layers.items()}
        return ServedAdapter(settings.rank, adapter.scale, layers)


def served_settings(settings: LoraSettings) -> LoraSettings:
    """An engine is given A and B before it serves, and drops nothing."""
    return settings.model_copy(update={"init_from": None, "dropout": 0.0})
