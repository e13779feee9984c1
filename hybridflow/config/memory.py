"""Bytes that every role holds in every phase of a step, from numbers alone: nothing is loaded.

Counted is what lives from step to step: weights, gradients, optimizer states, key-value caches. Activations, logits and
DeepSpeed's reduce buckets come on top; they depend on tokens_per_micro_batch and the engine's own settings.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from hybridflow.config.model_numbers import decoder_of, role_facts
from hybridflow.config.phases import engines_sleep, offloaded, on_gpus
from hybridflow.config.placement_checks import VLLM_LORA_RANKS, VLLM_VOCABULARY_MULTIPLE
from hybridflow.config.run_config import MODEL_TYPES, RunConfig
from hybridflow.resharding.cuts import shard
from hybridflow.resharding.decoder import Decoder, EngineCuts, adapter_specs, decoder_specs
from hybridflow.resharding.layout import dtype_of
from hybridflow.resharding.shards import ZERO_ALIGNMENT, Spec
from hybridflow.roles import MemoryPart

PERSISTENT = 100_000
"""Parameters up to this many elements stay gathered on every rank under ZeRO 3: DeepSpeed's default."""

FLOAT32 = 4
OPTIMIZER_STATES = {"adamw": 2, "sgd": 0}  # float32 numbers a trained weight


@dataclass(frozen=True)
class Held:
    """Bytes of one rank of a training engine; of a rollout, one worker of an engine. cache: keys and values; lasting,
    or there only while it decodes. in_flight: the most that an engine holds beside its weights while it takes new ones.
    sleeps: an engine that gives weights and cache back while others train. offloads: what a trained role gives back
    while engines generate."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    cache: int = 0
    lasting_cache: bool = True
    in_flight: int = 0
    keeps_gradients: bool = False
    sleeps: bool = False
    offloads: tuple[MemoryPart, ...] = ()

    @property
    def phases(self) -> dict[str, int]:
        """Peak bytes in training, in transition (actor to engines) and in generation (`hybridflow.schedule.phases`).

        An engine that sleeps has no cache while it takes new weights. One that does not (a CPU's, in a process of its
        own) keeps both: during the transition the node has trainer's and engine's weights.
        """
        between: dict[MemoryPart, int] = {
            "weights": self.weights,
            "optimizer": self.optimizer,
            "gradients": self.gradients if self.keeps_gradients else 0,
        }
        stays = sum(size for part, size in between.items() if part not in self.offloads)
        leaves_last = self.weights if "weights" in self.offloads else 0
        idle_cache = self.cache if self.lasting_cache and not self.sleeps else 0
        return {
            "training": 0 if self.sleeps else self.weights + self.optimizer + self.gradients + idle_cache,
            "transition": stays + leaves_last + self.in_flight + idle_cache,
            "generation": stays + self.cache,
        }


def held(config: RunConfig, role: str, product: str) -> Held | None:
    """What one rank of the role instance holds. None for a function, and where the model's sizes are not known.
    product: the role that the run's algorithm trains, whatever its type."""
    if config.role_type(role) == "rollout":
        return _engine(config)
    if config.role_type(role) not in MODEL_TYPES:
        return None
    instance = config.instance(role)
    engine = instance.engine if instance is not None else None
    decoder = decoder_of(role_facts(config, role), getattr(engine, "dtype", "float32"))
    if decoder is None:
        return None
    trains = config.role_type(role) in ("actor", "critic") or role == product
    found = training(decoder, engine, local_sizes(config, role, decoder), config.shape(role).data, trains)
    return replace(found, offloads=offloaded(config, (role,)).get(role, ()))


def local_sizes(config: RunConfig, role: str, decoder: Decoder) -> list[int]:
    """Elements of every tensor that a tensor rank holds, before ZeRO; tied ones once."""
    kind, facts = config.role_type(role), role_facts(config, role)
    specs = decoder_specs(decoder)
    values = kind in ("critic", "reward_model")  # one number a token in place of the head
    if values or facts.get("tie_word_embeddings"):
        specs = [spec for spec in specs if spec.parameter.name != "lm_head.weight"]
    return shard_sizes(specs, config.shape(role).tensor) + ([decoder.hidden_size, 1] if values else [])


def shard_sizes(specs: Iterable[Spec], tensor: int) -> list[int]:
    """Elements of each parameter on tensor rank 0, padding included: no rank holds more."""
    at = {"tensor": (0, tensor), "expert": (0, 1)}
    return [shard(spec.parameter.name, spec.parameter.shape, spec.cuts, at).num_elements for spec in specs]  # type: ignore[arg-type]


def training(decoder: Decoder, engine: Any, sizes: Sequence[int], data: int, trains: bool) -> Held:
    """sizes: elements of each tensor on this tensor rank. data: ranks that ZeRO shares them over."""
    itemsize = dtype_of(decoder.dtype).itemsize
    name, stage = getattr(engine, "name", "torch"), getattr(engine, "zero_stage", 0)
    lora = getattr(engine, "lora", None)
    if not trains or name == "torch" or stage == 0:
        whole = sum(sizes) * itemsize
        if not trains:
            return Held(whole)
        trained = sum(_adapter_sizes(decoder, lora) if lora else sizes)
        masters = FLOAT32 * trained if itemsize < FLOAT32 else 0
        states = _states(engine) * max(itemsize, FLOAT32) * trained
        extra = trained * itemsize if lora else 0
        gradients = trained * max(itemsize, FLOAT32)
        return Held(whole + extra, gradients, masters + states, keeps_gradients=name == "torch")
    return _zero(decoder, engine, sizes, data, stage, itemsize)


def _zero(decoder: Decoder, engine: Any, sizes: Sequence[int], data: int, stage: int, itemsize: int) -> Held:
    """ZeRO 1 to 3: float32 masters and optimizer states of 1 / data of what trains, beside the weights themselves."""
    lora = getattr(engine, "lora", None)
    trained = _adapter_sizes(decoder, lora) if lora else list(sizes)
    frozen = list(sizes) if lora else []
    part = _part(sum(trained), data) if stage < 3 else sum(-(-size // data) for size in trained)
    if stage < 3:
        # The weights are views of one flat buffer, padded so that it divides.
        weights = (part * data + sum(frozen)) * itemsize
    else:
        limit = _persistence_threshold(engine)
        gathered = sum(size for size in (*trained, *frozen) if size <= limit)
        weights = (part + sum(-(-size // data) for size in frozen) + gathered) * itemsize
    gradients = FLOAT32 * (sum(trained) if stage == 1 else part)
    optimizer = (1 + _states(engine)) * FLOAT32 * part
    # ZeRO 1 sums bfloat16's gradients in a float32 buffer of its own, which stays.
    return Held(weights, gradients, optimizer, keeps_gradients=stage == 3 or (stage == 1 and itemsize < FLOAT32))


def _part(total: int, data: int) -> int:
    return -(-total // (data * ZERO_ALIGNMENT)) * ZERO_ALIGNMENT


def _persistence_threshold(engine: Any) -> int:
    section = getattr(engine, "deepspeed", {}).get("zero_optimization", {})
    return int(section.get("stage3_param_persistence_threshold", PERSISTENT))


def _states(engine: Any) -> int:
    return OPTIMIZER_STATES.get(getattr(getattr(engine, "optimizer", None), "name", "adamw"), 2)


def _adapter_sizes(decoder: Decoder, lora: Any) -> list[int]:
    """Elements of A (rank x in) and B (out x rank) at every linear layer that has them; the output head has none."""
    return [spec.parameter.num_elements for spec in adapter_specs(decoder, lora.rank, lora.target_modules)]


def generation_cuts(config: RunConfig) -> EngineCuts:
    """How the rollout's engine divides and stores the model."""
    if getattr(config.rollout, "engine", None) == "hf":
        return EngineCuts()
    return EngineCuts(VLLM_VOCABULARY_MULTIPLE, fused=True, cut_experts=True)


def _engine(config: RunConfig) -> Held | None:
    facts = role_facts(config, "rollout")
    decoder = decoder_of(facts, getattr(config.rollout, "dtype", "float32"))
    if decoder is None:
        return None
    itemsize = dtype_of(decoder.dtype).itemsize
    specs, tied = decoder_specs(decoder, generation_cuts(config)), 0
    if facts.get("tie_word_embeddings"):
        tied = decoder.vocab_size * decoder.hidden_size
        specs = [spec for spec in specs if spec.parameter.name != "lm_head.weight"]
    sizes = shard_sizes(specs, config.bundles_per_rank("rollout"))
    layers: dict[object, int] = {}
    for spec, size in zip(specs, sizes, strict=True):
        layers[spec.where] = layers.get(spec.where, 0) + size
    hf = getattr(config.rollout, "engine", None) == "hf"
    adapter = sum(shard_sizes(_held_adapter(config, decoder), config.bundles_per_rank("rollout")))
    return Held(
        weights=(sum(sizes) + adapter) * itemsize,
        cache=_hf_cache(config, decoder) if hf else int(getattr(config.rollout, "kv_cache_gib", 0.0) * 2**30),
        lasting_cache=not hf,
        # vLLM packs a layer beside the old one; hf copies in place, but for a tied head, which it compares.
        in_flight=(tied if hf else 2 * max(layers.values())) * itemsize,
        sleeps=engines_sleep(config) and (on_gpus(config, "rollout") or (hf and actor_adapter(config) is None)),
    )


def actor_adapter(config: RunConfig) -> Any:
    """Settings of the adapter that the actor trains, which engines serve; None where it trains all weights."""
    return getattr(config.actor.engine, "lora", None) if config.has_adapter("actor") else None


def _held_adapter(config: RunConfig, decoder: Decoder) -> list[Spec]:
    """vLLM's layers hold A and B of the next rank that it knows, of all that is stored with an adapted weight (q, k and
    v are one), in every layer."""
    lora, cuts = actor_adapter(config), generation_cuts(config)
    if lora is None:
        return []
    adapted = adapter_specs(decoder, lora.rank, lora.target_modules, cuts)
    if not cuts.fused:
        return adapted
    specs = decoder_specs(decoder, cuts)
    stored = {spec.parameter.name.rpartition(".")[0]: spec.storage_name.split(".")[-2] for spec in specs}
    wrapped = {stored[spec.parameter.name.partition(".lora_")[0]] for spec in adapted}
    modules = sorted({layer.rpartition(".")[2] for layer, module in stored.items() if module in wrapped})
    rank = min((known for known in VLLM_LORA_RANKS if known >= lora.rank), default=lora.rank)
    return adapter_specs(decoder, rank, modules, cuts)


def _hf_cache(config: RunConfig, decoder: Decoder) -> int:
    """Keys and values of the rows that decode together, at their longest; allocated while they do."""
    rows = getattr(config.rollout, "max_num_seqs", 1)
    longest = config.data.max_prompt_tokens + config.rollout.sampling.max_response_tokens  # type: ignore[attr-defined]
    shape = (2, decoder.num_layers, decoder.num_kv_heads, decoder.head_size, rows, longest)
    return prod(shape) * dtype_of(decoder.dtype).itemsize
