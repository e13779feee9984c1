"""Hugging Face parameters under the names that vLLM's loaders know.

They differ for mixtures of experts: transformers keeps all experts of a layer in two tensors, `experts.gate_up_proj`
(experts, 2 x inner, hidden) and `experts.down_proj` (experts, hidden, inner); vLLM loads the checkpoint's form, one
matrix an expert.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

_EXPERTS = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen2_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
"""model_type -> the checkpoint's name of `mlp`, and of gate, up and down."""


def checkpoint_views(config: Any, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same weights as views under checkpoint names, one at a time. config: the model's Hugging Face config."""
    owner, (gate, up, down) = _EXPERTS.get(config.model_type, ("mlp", ("", "", "")))
    for name, tensor in weights:
        known = name.replace(".mlp.", f".{owner}.")
        stem, _, kind = known.rpartition(".")
        if not gate or not stem.endswith(".experts"):
            yield known, tensor
        elif kind == "gate_up_proj":
            inner = tensor.shape[1] // 2
            for expert, both in enumerate(tensor):
                yield f"{stem}.{expert}.{gate}.weight", both[:inner]
                yield f"{stem}.{expert}.{up}.weight", both[inner:]
        else:
            for expert, matrix in enumerate(tensor):
                yield f"{stem}.{expert}.{down}.weight", matrix
