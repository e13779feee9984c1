"""A model's sizes from its Hugging Face config alone, what the config leaves out filled in; no weights are read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridflow.config.response_lengths import local_tokenizer_of
from hybridflow.config.run_config import RunConfig
from hybridflow.config.section_checks import BUILT_IN_VOCABULARY
from hybridflow.resharding.decoder import Decoder

DECODERS = {"llama": False, "mistral": False, "mixtral": False, "qwen2": True}
"""Model types whose parameters `hybridflow.resharding.decoder` lists -> whether q, k and v have a bias."""


SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"
)  # fmt: skip


def model_facts(config: RunConfig) -> dict[str, Any]:
    """The Hugging Face config where it can be read without a download; empty for a hub id."""
    if config.model.config is not None:
        return config.model.config
    return folder_facts(config.model.path)


def folder_facts(folder: str | Path | None) -> dict[str, Any]:
    file = Path(folder or "") / "config.json"
    return json.loads(file.read_text()) if folder and file.is_file() else {}


def role_facts(config: RunConfig, role: str) -> dict[str, Any]:
    """Complete sizes of the model that the role instance runs: its own, or the run's."""
    instance = config.instance(role)
    if instance is not None and instance.model is not None:
        return complete(folder_facts(instance.model))
    facts = dict(model_facts(config))
    if facts and "vocab_size" not in facts and config.model.path is None:
        tokens = BUILT_IN_VOCABULARY.get(config.model.tokenizer or "")
        tokenizer = local_tokenizer_of(config) if tokens is None else None
        facts["vocab_size"] = len(tokenizer) if tokenizer is not None else tokens
    return complete({name: value for name, value in facts.items() if value is not None})


def complete(facts: Mapping[str, Any]) -> dict[str, Any]:
    """With the defaults of its model type. As given where transformers does not know the type or refuses the values:
    that is said elsewhere, or when the model is made."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    kind = facts.get("model_type")
    if kind not in CONFIG_MAPPING:
        return dict(facts)
    fields = {name: value for name, value in facts.items() if name != "model_type"}
    try:
        return CONFIG_MAPPING[kind](**fields).to_dict()
    except (StrictDataclassError, ValueError, TypeError):
        return dict(facts)


def head_size(facts: Mapping[str, Any]) -> int:
    return facts.get("head_dim") or facts["hidden_size"] // facts["num_attention_heads"]


def decoder_of(facts: Mapping[str, Any], dtype: str) -> Decoder | None:
    """The parameters' sizes, from complete facts; None for a model type whose parameters are not listed."""
    kind = str(facts.get("model_type"))
    known = kind in DECODERS and all(isinstance(facts.get(name), int) for name in SIZES)
    if not known or facts.get("attention_bias") or facts.get("mlp_bias"):
        return None
    return Decoder(
        vocab_size=facts["vocab_size"],
        hidden_size=facts["hidden_size"],
        intermediate_size=facts["intermediate_size"],
        num_layers=facts["num_hidden_layers"],
        num_heads=facts["num_attention_heads"],
        num_kv_heads=facts["num_key_value_heads"],
        head_size=head_size(facts),
        qkv_bias=DECODERS[kind],
        num_experts=facts["num_local_experts"] if kind == "mixtral" else 0,
        dtype=dtype,
    )
