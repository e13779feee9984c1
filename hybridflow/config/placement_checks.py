"""Whether ranks, layouts and models fit together: sizes that divide, and engines that can cut as they are asked to."""

from collections.abc import Callable, Mapping
from typing import Any

from hybridflow.config.model_numbers import role_facts
from hybridflow.config.problems import Problems
from hybridflow.config.run_config import MODEL_TYPES, RolePlacement, RunConfig

VLLM_VOCABULARY_MULTIPLE = 64
"""vLLM pads embedding and head to a multiple of this many rows, and cuts those."""

VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's LoRA layers have memory for one of these; an adapter between two of them takes the next."""

GENERATION_SIZE = "rollout.tensor_parallel_size"


def check_placement(config: RunConfig, roles: tuple[str, ...], problems: Problems) -> None:
    """Every role instance's p, t and d, or replicas and t_g, against its pool, its engine and, where the model's config
    is here already, its model."""
    for role in roles:
        place = config.place(role)
        if place is None or place.pool not in config.placement.pools:
            continue  # said already
        kind, key = config.role_type(role), place_key(config, role)
        if kind == "rollout":
            _replicas(config, place, key, problems)
            _served_adapter(config, problems)
        elif kind in MODEL_TYPES:
            _training_shape(config, role, place, key, problems)
        else:
            _function(place, key, problems)
        check_cuts(config, role, role_facts(config, role), problems)


def place_key(config: RunConfig, role: str) -> str:
    """Where a person sets the role's placement."""
    return f"placement.roles.{config.placed_as(role)}"


def engine_key(config: RunConfig, role: str) -> str:
    """Where a person sets the role's engine."""
    return f"instances.{role}.engine" if role in config.instances else f"{role}.engine"


def check_cuts(config: RunConfig, role: str, facts: Mapping[str, Any], problems: Problems) -> None:
    """Whether the role's layout divides the model with these facts (its complete Hugging Face config; may be empty)."""
    place, kind = config.place(role), config.role_type(role)
    if place is None or not facts:
        return
    if kind == "rollout" and getattr(config.rollout, "engine", None) != "hf":
        size = getattr(config.rollout, "tensor_parallel_size", 1)
        _refuse_cut(GENERATION_SIZE, size, generation_divisions(facts), problems)
    elif kind in MODEL_TYPES:
        key = place_key(config, role)
        _refuse_cut(f"{key}.tensor", place.tensor, training_divisions(facts), problems)
        if place.tensor > 1 and (experts := facts.get("num_local_experts") or facts.get("num_experts")):
            text = f"found {place.tensor}; the model has {experts} experts, which training does not cut yet: allowed 1"
            problems.add(f"{key}.tensor", text)
        elif place.tensor > 1 and (family := facts.get("model_type")) not in CUT_FAMILIES:
            text = f"found {place.tensor}; training cuts models of type {', '.join(CUT_FAMILIES)}, this one is {family}"
            problems.add(f"{key}.tensor", f"{text}: allowed 1")
        layers = facts.get("num_hidden_layers")
        if isinstance(layers, int) and layers % place.pipeline:
            text = f"found {place.pipeline}; it must divide the model's {layers} layers"
            problems.add(f"{key}.pipeline", f"{text}: {_listed(lambda size: layers % size == 0, layers)}")


CUT_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that tensor-parallel training knows how to cut (`workers/training/tensor_parallel.py`)."""

Division = tuple[str, Callable[[int], bool]]
"""What is divided, in words, and whether a size divides it."""


def training_divisions(facts: Mapping[str, Any]) -> list[Division]:
    """AutoTP cuts q, k and v by key-value heads and leaves the vocabulary whole."""
    return [
        (f"{facts[name]} {words}", lambda size, whole=facts[name]: whole % size == 0)  # type: ignore[misc]
        for name, words in (
            ("num_attention_heads", "attention heads"),
            ("num_key_value_heads", "key-value heads"),
            ("intermediate_size", "columns of the feed-forward"),
        )
        if isinstance(facts.get(name), int)
    ]


def generation_divisions(facts: Mapping[str, Any]) -> list[Division]:
    """vLLM gives neighbouring workers the same key-value head where there are fewer heads than workers."""
    found = [(words, divides) for words, divides in training_divisions(facts) if "key-value" not in words]
    heads, tokens = facts.get("num_key_value_heads"), facts.get("vocab_size")
    if isinstance(heads, int):
        found.append((f"{heads} key-value heads (or be a multiple)", lambda size: not (heads % size and size % heads)))
    if isinstance(tokens, int):
        rows = -(-tokens // VLLM_VOCABULARY_MULTIPLE) * VLLM_VOCABULARY_MULTIPLE
        found.append((f"vocabulary of {tokens}, padded to {rows} rows", lambda size: rows % size == 0))
    return found


def _refuse_cut(key: str, size: int, divisions: list[Division], problems: Problems) -> None:
    wrong = [words for words, divides in divisions if not divides(size)]
    if wrong:
        most = max(
            (int(words.split()[0]) for words, _ in divisions if words.endswith(" attention heads")), default=size
        )
        legal = _listed(lambda one: all(divides(one) for _, divides in divisions), most)
        problems.add(key, f"found {size}; it must divide the model's {', '.join(wrong)}: {legal}")


def _listed(allowed: Callable[[int], bool], most: int) -> str:
    return ", ".join(str(size) for size in range(1, most + 1) if allowed(size))


def _replicas(config: RunConfig, place: RolePlacement, key: str, problems: Problems) -> None:
    if place.tensor != 1:
        problems.add(f"{key}.tensor", f"found {place.tensor}; a rollout rank is a replica: set {GENERATION_SIZE}")
    if place.pipeline != 1:
        text = f"found {place.pipeline}; no rollout engine has pipeline stages: allowed 1"
        problems.add(f"{key}.pipeline", text)
    size, bundles = config.bundles_per_rank("rollout"), config.placement.pools[place.pool].ranks
    takes = f"one rank of pool {place.pool!r} for each worker, and that pool has {bundles}"
    if size > bundles:
        text = f"found {size}; an engine takes {takes}: at most {bundles}, or raise placement.pools.{place.pool}.ranks"
        problems.add(GENERATION_SIZE, text)
    elif place.ranks is not None and place.ranks * size > bundles >= place.ranks:
        text = f"found {place.ranks} replicas of {GENERATION_SIZE}={size}; each takes {takes}"
        problems.add(f"{key}.ranks", f"{text}: at most {bundles // size}")


def _served_adapter(config: RunConfig, problems: Problems) -> None:
    """The engines serve the adapter that the actor trains."""
    rank, most = getattr(getattr(config.actor.engine, "lora", None), "rank", 0), max(VLLM_LORA_RANKS)
    if rank > most and getattr(config.rollout, "engine", None) != "hf":
        text = f"found {rank}; the LoRA layers of rollout.engine=vllm have ranks up to {most}: allowed 1 to {most}"
        problems.add(f"{engine_key(config, 'actor')}.lora.rank", f"{text}, or rollout=hf")
    place, facts = config.place("rollout"), role_facts(config, "rollout")
    on_cpu = place is not None and config.placement.pools[place.pool].gpus_per_rank == 0
    experts = facts.get("num_local_experts") or facts.get("num_experts")
    if rank and on_cpu and experts and getattr(config.rollout, "engine", None) != "hf":
        text = f"found one, and a model of {experts} experts, which vLLM on a CPU cannot run beside an adapter"
        problems.add(f"{engine_key(config, 'actor')}.lora", f"{text}: allowed null, or rollout=hf")


def _function(place: RolePlacement, key: str, problems: Problems) -> None:
    for name in ("pipeline", "tensor"):
        if (found := getattr(place, name)) != 1:
            problems.add(f"{key}.{name}", f"found {found}; the role is a function and holds no model: allowed 1")


def _training_shape(config: RunConfig, role: str, place: RolePlacement, key: str, problems: Problems) -> None:
    ranks, cut = config.ranks(role), place.pipeline * place.tensor
    if ranks % cut:
        most = config.placement.pools[place.pool].ranks
        legal = ", ".join(str(count) for count in range(cut, most + 1, cut))
        allowed = legal or f"none in pool {place.pool!r} of {most} ranks: raise placement.pools.{place.pool}.ranks"
        text = f"found {ranks} with pipeline={place.pipeline} and tensor={place.tensor}; ranks are pipeline x tensor x"
        problems.add(f"{key}.ranks", f"{text} data, a multiple of {cut}: {allowed}")
    if place.pipeline > 1:
        text = "layouts, plans and transfers know pipeline stages, but no engine trains with them yet: allowed 1"
        problems.add(f"{key}.pipeline", f"found {place.pipeline}; {text}")
    if place.tensor > 1:
        _cut_engine(config, role, place.tensor, f"{key}.tensor", problems)


def _cut_engine(config: RunConfig, role: str, tensor: int, key: str, problems: Problems) -> None:
    """What an engine cannot do on weights that are cut over tensor ranks."""
    instance, where = config.instance(role), engine_key(config, role)
    engine = instance.engine if instance is not None else None
    if getattr(engine, "name", None) == "torch":
        text = f"found {tensor}; {where}.name is torch, which holds whole models: allowed 1, or name=deepspeed"
        problems.add(key, text)
    if getattr(engine, "lora", None) is not None:
        text = f"found {tensor} with {where}.lora; an adapter beside cut weights is not supported yet"
        problems.add(key, f"{text}: allowed 1, or lora=null")
    if getattr(engine, "compile", False):
        text = f"found {tensor} with {where}.compile; cut layers are not compiled: allowed 1, or compile=false"
        problems.add(key, text)
