"""The parameters of a Llama, Qwen2 or Mixtral decoder, and how the engines cut them, from the config's numbers alone.

q, k, v, gate and up are cut by output rows, o and down by input columns (Megatron-LM, arXiv 1909.08053): the cuts of
both DeepSpeed's AutoTP and vLLM. They differ in what is stored together and in the vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from hybridflow.resharding.cuts import Cut, Even, Experts, Fused, Heads, Vocabulary
from hybridflow.resharding.layout import Parameter
from hybridflow.resharding.shards import Spec, Where


@dataclass(frozen=True)
class Decoder:
    """Sizes as in a Hugging Face config. head_size: of one attention head; qkv_bias: Qwen2's. Tied models list
    lm_head.weight too, since engines want it by name; `num_experts` > 0 replaces the feed-forward by Mixtral's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    qkv_bias: bool = False
    num_experts: int = 0
    dtype: str = "float32"


@dataclass(frozen=True)
class EngineCuts:
    """What is the engine's choice. vocabulary_multiple: rows of embedding and head are padded to it and cut (0: every
    rank holds them whole, as AutoTP does). fused: q/k/v and gate/up lie in one tensor each (vLLM). cut_experts: the
    experts' inner axis is cut by tensor, beside whole experts to ranks."""

    vocabulary_multiple: int = 0
    fused: bool = False
    cut_experts: bool = False


def decoder_specs(model: Decoder, engine: EngineCuts = EngineCuts()) -> list[Spec]:
    """Every parameter under its Hugging Face name, in the order of the layers."""
    vocabulary: tuple[Cut, ...] = (Vocabulary(engine.vocabulary_multiple),) if engine.vocabulary_multiple else ()
    table = (model.vocab_size, model.hidden_size)
    specs = [_spec(model, "model.embed_tokens.weight", table, "first", vocabulary)]
    for layer in range(model.num_layers):
        specs += _layer(model, engine, layer)
    specs.append(_spec(model, "model.norm.weight", (model.hidden_size,), "last"))
    specs.append(_spec(model, "lm_head.weight", table, "last", vocabulary))
    return specs


def adapter_specs(
    model: Decoder, rank: int, modules: Literal["all-linear"] | Sequence[str], engine: EngineCuts = EngineCuts()
) -> list[Spec]:
    """A (rank, inputs) and B (outputs, rank) beside every linear layer of these names, or ends of names; the output
    head has none. Beside a weight that is cut by rows B is cut so, beside one that is cut by columns A."""
    found = []
    for spec in decoder_specs(model, engine):
        layer, _, kind = spec.parameter.name.rpartition(".")
        named = modules == "all-linear" or any(layer == name or layer.endswith(f".{name}") for name in modules)
        if kind != "weight" or not layer.endswith("_proj") or not named:
            continue
        rows, columns = spec.parameter.shape
        by = {cut.dim: (cut,) for cut in spec.cuts}
        found.append(_spec(model, f"{layer}.lora_A.weight", (rank, columns), spec.where, by.get(1, ())))
        found.append(_spec(model, f"{layer}.lora_B.weight", (rows, rank), spec.where, by.get(0, ())))
    return found


def _layer(model: Decoder, engine: EngineCuts, layer: int) -> Iterator[Spec]:
    prefix = f"model.layers.{layer}."
    hidden = (model.hidden_size,)
    yield _spec(model, f"{prefix}input_layernorm.weight", hidden, layer)
    yield from _attention(model, engine, layer, f"{prefix}self_attn.")
    yield _spec(model, f"{prefix}post_attention_layernorm.weight", hidden, layer)
    if not model.num_experts:
        yield from _feed_forward(model, engine, layer, f"{prefix}mlp.")
        return
    yield _spec(model, f"{prefix}mlp.gate.weight", (model.num_experts, model.hidden_size), layer)
    up_cuts: tuple[Cut, ...] = (Experts(),)
    down_cuts: tuple[Cut, ...] = (Experts(),)
    inner = model.intermediate_size
    if engine.cut_experts:
        up_cuts += (Fused(((inner, Even(1)), (inner, Even(1))), dim=1),)
        down_cuts += (Even(2),)
    up, down = (model.num_experts, 2 * inner, model.hidden_size), (model.num_experts, model.hidden_size, inner)
    yield _spec(model, f"{prefix}mlp.experts.gate_up_proj", up, layer, up_cuts)
    yield _spec(model, f"{prefix}mlp.experts.down_proj", down, layer, down_cuts)


def _attention(model: Decoder, engine: EngineCuts, layer: int, prefix: str) -> Iterator[Spec]:
    heads = {"q": Heads(model.num_heads), "k": Heads(model.num_kv_heads, replicate=True)}
    heads["v"] = heads["k"]
    kinds = ("weight", "bias") if model.qkv_bias else ("weight",)
    for kind in kinds:
        for which, cut in heads.items():
            rows = cut.heads * model.head_size
            shape = (rows, model.hidden_size) if kind == "weight" else (rows,)
            storage = f"{prefix}qkv_proj.{kind}" if engine.fused else None
            yield _spec(model, f"{prefix}{which}_proj.{kind}", shape, layer, (cut,), storage)
    width = model.num_heads * model.head_size
    out = Even(1, unit=model.head_size)
    yield _spec(model, f"{prefix}o_proj.weight", (model.hidden_size, width), layer, (out,))


def _feed_forward(model: Decoder, engine: EngineCuts, layer: int, prefix: str) -> Iterator[Spec]:
    storage = f"{prefix}gate_up_proj.weight" if engine.fused else None
    for which in ("gate", "up"):
        shape = (model.intermediate_size, model.hidden_size)
        yield _spec(model, f"{prefix}{which}_proj.weight", shape, layer, (Even(0),), storage)
    yield _spec(model, f"{prefix}down_proj.weight", (model.hidden_size, model.intermediate_size), layer, (Even(1),))


def _spec(
    model: Decoder,
    name: str,
    shape: tuple[int, ...],
    where: Where,
    cuts: tuple[Cut, ...] = (),
    storage: str | None = None,
) -> Spec:
    return Spec(Parameter(name, shape, model.dtype), where, cuts, storage)
