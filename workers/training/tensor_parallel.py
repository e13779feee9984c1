"""Tensor parallelism by DeepSpeed's AutoTP: which parameters are cut over the ranks of a tensor group, and how.

q, k, v, gate and up are cut by output rows, o and down by input columns (Megatron-LM, 1909.08053): a layer has one
all-reduce after attention and one after the feed-forward. Embeddings, head, norms and a value head are on every rank,
so log-probs are computed in chunks as without. The data must be the same on all ranks of a group.
"""

import re
from collections.abc import Mapping
from math import gcd
from typing import Any, ClassVar

import torch
import torch.distributed
from torch import Tensor, nn

from hybridflow.errors import ConfigError, HybridFlowError
from hybridflow.resharding.cuts import Cut, Even
from workers.training.modeling import VALUE_HEAD_PREFIX, Scorer
from workers.training.settings import EngineSettings

_ROWS = r"\.(self_attn\.[qkv]_proj|mlp\.(gate|up)_proj)"
_COLUMNS = r"\.(self_attn\.o_proj|mlp\.down_proj)"
_HEAD_NORMS = r"\.self_attn\.[qk]_norm"
_WHOLE = r"(^|\.)(embed_tokens|lm_head|norm|\w+_layernorm)\.(weight|bias)$"


def tensor_parallel_config(tensor: int) -> dict[str, Any]:
    """DeepSpeed's section. The cuts are spelled out: what it finds by itself would cut the head of some models."""
    specs = [
        {"patterns": [rf".*{_ROWS}\.(weight|bias)$"], "partition_type": "column"},
        {"patterns": [rf".*{_COLUMNS}\.weight$"], "partition_type": "row"},
        # Each rank sees some of the heads that these norms scale, so their gradients are summed over the group.
        {"patterns": [rf".*{_HEAD_NORMS}\.weight$"], "partition_type": "skip", "grad_allreduce": True},
    ]
    return {
        "autotp_size": tensor,
        "vocab_parallel_lm_head": False,
        "partition_config": {"use_default_specs": False, "layer_specs": specs},
    }


def cut_of(name: str) -> Cut | None:
    """How the parameter of this name is divided over tensor ranks; None: every rank has all of it."""
    if re.search(rf"{_ROWS}\.(weight|bias)$", name):
        return Even(0)
    return Even(1) if re.search(rf"{_COLUMNS}\.weight$", name) else None


def refuse_settings(settings: EngineSettings, tensor: int) -> None:
    """Before a model is loaded: what tensor parallelism does not do."""
    for key, on in (("lora", settings.lora is not None), ("compile", settings.compile)):
        if on:
            raise ConfigError(
                f"engine.{key}: is set, and tensor={tensor}; allowed with it: tensor=1. Set tensor=1 (ZeRO 3 shards "
                f"the weights too), or {key}={'null' if key == 'lora' else 'false'}"
            )


def refuse_model(scorer: Scorer, tensor: int) -> None:
    """Raises ConfigError for a model that cannot be cut over `tensor` ranks, with the sizes that can."""
    config, hf = scorer.hf.config.get_text_config(), scorer.hf
    heads = config.num_attention_heads
    sizes = {"num_attention_heads": heads, "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads}
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    odd = []
    for name, parameter in hf.named_parameters():
        cut = cut_of(f".{name}")
        if cut is None:
            head_norm = re.search(_HEAD_NORMS, name) and parameter.numel() == head_size
            biases = re.search(rf"{_COLUMNS}\.bias$", name)
            odd += [] if head_norm or biases or re.search(_WHOLE, name) else [name]
            continue
        odd += [] if type(hf.get_submodule(name.rpartition(".")[0])) is nn.Linear else [name]
        if ".mlp." in name:
            sizes[f"mlp.{name.split('.')[-2]}"] = parameter.shape[cut.dim]
    if odd or len(sizes) == 2:
        what = f"it has {odd[0]}" if odd else "it has no q_proj, gate_proj and the like"
        raise ConfigError(
            f"tensor={tensor}: {type(hf).__name__} cannot be cut: {what}; decoders of the Llama and Qwen kind without "
            "experts can. Set tensor=1"
        )
    common = gcd(*sizes.values())
    if common % tensor:
        legal = [size for size in range(1, common + 1) if common % size == 0]
        found = ", ".join(f"{key}={size}" for key, size in sizes.items())
        raise ConfigError(f"tensor={tensor}: does not divide {found} of {type(hf).__name__}; allowed: {legal}")


class TensorGroup:
    """This rank's tensor group; one of size 1 cuts nothing and communicates nothing."""

    _of_process: ClassVar[int | None] = None

    def __init__(self, size: int) -> None:
        """DeepSpeed keeps its groups in globals: a process that asks for a second size is refused."""
        if TensorGroup._of_process not in (None, size):
            raise HybridFlowError(
                f"engine=deepspeed: tensor={size} in a process that has tensor={TensorGroup._of_process}; one process "
                "can have one size: give the roles a process each"
            )
        self.size = TensorGroup._of_process = size

    @property
    def _group(self) -> Any:
        from deepspeed.utils import groups

        return groups.get_tensor_model_parallel_group()

    def cuts(self, scorer: Scorer) -> dict[str, Cut]:
        """Of the parameters by Hugging Face name; whole ones are left out."""
        found = {name: cut_of(f".{name}") for name in scorer.named_tensors() if not name.startswith(VALUE_HEAD_PREFIX)}
        return {name: cut for name, cut in found.items() if cut is not None} if self.size > 1 else {}

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The parameter (or its gradient) of which every rank has a part; the same tensor where none is cut."""
        cut = cut_of(f".{name}") if self.size > 1 else None
        if cut is None:
            return part
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.size)]
        torch.distributed.all_gather(parts, part.contiguous(), group=self._group)
        return torch.cat(parts, dim=cut.dim)

    def norm(self, gradients: Mapping[str, Tensor]) -> float:
        """Of the whole model's gradient: what is on every rank counts once. Equal on all ranks, bit by bit."""
        cut: list[Tensor] = []
        whole: list[Tensor] = []
        for name, gradient in gradients.items():
            (whole if self.size == 1 or cut_of(f".{name}") is None else cut).append(gradient)
        norm_whole = torch.nn.utils.get_total_norm(whole)
        if self.size == 1:
            return float(norm_whole)
        square = torch.nn.utils.get_total_norm(cut).double() ** 2
        torch.distributed.all_reduce(square, group=self._group)
        return float((square + norm_whole.double() ** 2).sqrt())
