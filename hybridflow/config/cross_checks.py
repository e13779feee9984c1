"""What no section can know alone: combinations, files, packages, cores. All are checked; none raises."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hybridflow.algorithm import Algorithm
from hybridflow.config.algorithm_checks import check_context, check_extra_data, check_rows
from hybridflow.config.model_numbers import model_facts
from hybridflow.config.model_paths import VALUE_HEAD_FILE
from hybridflow.config.phases import check_phases
from hybridflow.config.placement_checks import check_placement, engine_key
from hybridflow.config.problems import Problems, choice
from hybridflow.config.response_lengths import check_forced_texts, local_tokenizer_of, longest_responses
from hybridflow.config.run_config import MODEL_TYPES, RunConfig
from hybridflow.config.section_checks import BUILT_IN_VOCABULARY
from hybridflow.config.vocabularies import check_vocabulary
from hybridflow.plugin_files import is_file_name

EXTRAS = {
    "deepspeed": "pip install 'hybridflow[deepspeed]', or choose 'torch'",
    "vllm": "pip install 'hybridflow[vllm]' (without a GPU: --no-deps -r requirements/cpu.txt), or choose 'hf'",
}


def cross_check(config: RunConfig, algorithm: type[Algorithm], problems: Problems) -> None:
    """Adds every problem that shows only when sections are seen together."""
    roles = tuple(algorithm.required_roles(config.algorithm.config))
    known = tuple(role for role in roles if config.instance(role) is not None)
    for role in sorted(set(roles) - set(known)):
        text = f"missing; {config.algorithm.name} calls a role instance of this name: give it a `type` and settings"
        problems.add(f"instances.{role}", text)
    roles = config.with_ranks(known)
    _workers(config, roles, problems)
    _placement(config, roles, problems)
    check_placement(config, roles, problems)
    check_phases(config, algorithm, roles, problems)
    _packages(config, roles, problems)
    _data(config, algorithm, problems)
    check_rows(config, algorithm, problems)
    check_extra_data(config, algorithm, problems)
    check_context(config, algorithm, problems)
    _vocabularies(config, roles, problems)
    _reward_heads(config, roles, algorithm.product, problems)
    if algorithm.online:
        _sampling(config, problems)
    if "rollout" in roles:
        check_limits(config, model_facts(config), problems)
        check_forced_texts(config, problems)
        _language_model_heads(config, problems)
    for line in algorithm.model_problems(config.algorithm.config, model_facts(config)):
        problems.add_line(line, "algorithm")
    if config.runtime == "local":
        _local(config, roles, problems)


def model_roles(config: RunConfig, roles: tuple[str, ...]) -> list[str]:
    """Those that run a model in a training engine."""
    return [role for role in roles if config.role_type(role) in MODEL_TYPES]


def _workers(config: RunConfig, roles: tuple[str, ...], problems: Problems) -> None:
    """Modules are looked for, not imported: they may bring whole engines."""
    for role in roles:
        name = config.worker(role)
        if name is None:
            text = f"missing; {config.algorithm.name} needs this role: name the worker class that runs it"
            problems.add(f"workers.{config.role_type(role)}", text)
        elif is_file_name(name):
            if not Path(name.rpartition(":")[0]).is_file():
                problems.add(_worker_key(config, role), f"found {name!r}; there is no such file (from {Path.cwd()})")
        elif not _module_exists(name.rpartition(".")[0]):
            problems.add(_worker_key(config, role), f"found {name!r}; there is no such module on the Python path")


def _worker_key(config: RunConfig, role: str) -> str:
    if role in config.instances and config.instances[role].worker:
        return f"instances.{role}.worker"
    return f"workers.{role if role in config.workers else config.role_type(role)}"


def _module_exists(name: str) -> bool:
    try:
        return bool(name) and find_spec(name) is not None
    except ModuleNotFoundError:  # of the parent package
        return False


def _placement(config: RunConfig, roles: tuple[str, ...], problems: Problems) -> None:
    pools, placed = config.placement.pools, config.placement.roles
    for role, place in placed.items():
        key = f"placement.roles.{role}"
        if place.pool not in pools:
            problems.add(f"{key}.pool", choice(place.pool, pools))
        elif place.ranks is not None and place.ranks > pools[place.pool].ranks:
            most = pools[place.pool].ranks
            problems.add(f"{key}.ranks", f"found {place.ranks}; pool {place.pool!r} has {most} ranks: at most {most}")
    for role in roles:
        if config.place(role) is None:
            text = f"missing; {config.algorithm.name} needs this role: give it a pool out of {', '.join(pools)}"
            problems.add(f"placement.roles.{role}", text)
    if config.runtime == "ray" and config.ray.address == "local":
        _cores(config, roles, problems)


def _cores(config: RunConfig, roles: tuple[str, ...], problems: Problems) -> None:
    """Of the private cluster on this machine; a cluster that is joined is asked when the pools are made."""
    used = config.used_pools(roles)
    demand = {name: pool.ranks * pool.cpus_per_rank for name, pool in used.items()}
    machine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    supply = config.ray.num_cpus or machine
    if sum(demand.values()) > supply + 1e-9:
        listed = " + ".join(f"{name} {cpus:g}" for name, cpus in demand.items())
        remedy = "lower ranks or cpus_per_rank (fractions share a core), or another placement"
        whose = "ray.num_cpus is" if config.ray.num_cpus else "this machine has"
        problems.add("placement.pools", f"found a demand of {listed} CPUs; {whose} {supply}: {remedy}")


def _packages(config: RunConfig, roles: tuple[str, ...], problems: Problems) -> None:
    wanted = [(f"{engine_key(config, role)}.name", _field(config, role, "name")) for role in model_roles(config, roles)]
    if "rollout" in roles:
        wanted.append(("rollout.engine", getattr(config.rollout, "engine", None)))
    for key, package in wanted:
        if package in EXTRAS and find_spec(package) is None:
            problems.add(key, f"found {package!r}, which is not installed; {EXTRAS[package]}")


def _field(config: RunConfig, role: str, name: str) -> Any:
    instance = config.instance(role)
    return getattr(instance.engine, name, None) if instance else None


def _data(config: RunConfig, algorithm: type[Algorithm], problems: Problems) -> None:
    data = config.data
    held_out = algorithm.online or algorithm.evaluate is not Algorithm.evaluate
    if held_out and config.trainer.validates and data.validation is None and data.arithmetic is None:
        text = "null, but trainer.validate_every or validate_before asks for validation; set a file, or 0 and false"
        problems.add("data.validation", text)
    if data.format == "chat" and config.model.tokenizer in BUILT_IN_VOCABULARY:
        text = f"found 'chat'; tokenizer {config.model.tokenizer!r} has no chat template: data.format=raw"
        problems.add("data.format", text)


def _vocabularies(config: RunConfig, roles: tuple[str, ...], problems: Problems) -> None:
    """Role instances with a model of their own read the token ids of the run's."""
    own = [role for role in roles if (found := config.instance(role)) is not None and found.model is not None]
    for role in own if (tokenizer := local_tokenizer_of(config) if own else None) is not None else ():
        folder = Path(str(config.instances[role].model))
        if (folder / "config.json").is_file():
            check_vocabulary(f"instances.{role}.model", folder, tokenizer, problems)


def _reward_heads(config: RunConfig, roles: tuple[str, ...], trained: str, problems: Problems) -> None:
    """A frozen reward model must have been one before: a new head scores every text 0."""
    for role in roles:
        found = config.instance(role)
        if found is None or found.type != "reward_model" or role == trained:
            continue
        folder, lora = Path(found.model or config.model.path or ""), getattr(found.engine, "lora", None)
        places = [folder, *([Path(lora.init_from)] if lora is not None and lora.init_from is not None else [])]
        if (folder / "config.json").is_file() and not any((place / VALUE_HEAD_FILE).is_file() for place in places):
            text = f"found {str(folder)!r}, which has no {VALUE_HEAD_FILE}; allowed: the model/ folder of a run of"
            problems.add(f"instances.{role}.model", f"{text} algorithm=reward_model or process_reward_model")


def _sampling(config: RunConfig, problems: Problems) -> None:
    """A loss compares probabilities under the whole distribution with those of the one that was sampled from."""
    sampling = getattr(config.rollout, "sampling", None)
    if sampling is None:
        return
    refused = {
        "temperature": "above 0" if sampling.temperature == 0 else None,
        "top_p": "1" if sampling.top_p < 1 else None,
        "top_k": "0" if sampling.top_k > 0 else None,
    }
    why = "greedy or truncated samples have another distribution than the policy that is trained"
    for name, allowed in refused.items():
        if allowed is not None:
            text = f"found {getattr(sampling, name)}; allowed for training: {allowed} ({why}); validation may differ"
            problems.add(f"rollout.sampling.{name}", text)


def _language_model_heads(config: RunConfig, problems: Problems) -> None:
    """Trainer and rollout, both below float32, are to multiply by the head alike: they differ least when both widen."""
    both = (config.actor.engine, config.rollout)
    if any(getattr(engine, "dtype", "float32") in ("float32", "float64") for engine in both):
        return
    trainer, rollout = (getattr(engine, "float32_head", False) for engine in both)
    if trainer != rollout:
        key = f"{engine_key(config, 'actor')}.float32_head"
        text = f"found {str(trainer).lower()}; allowed: {str(rollout).lower()}, as rollout.float32_head"
        problems.add(key, f"{text}, or change both: one float32 head alone is worse than none")


def check_limits(
    config: RunConfig,
    facts: Mapping[str, Any],
    problems: Problems,
    tokenizer: Any = None,
) -> None:
    """What the rollout asks of the model. `facts`: its Hugging Face config. tokenizer: the run's, where it is here."""
    _lengths(config, facts, problems, longest_responses(config, tokenizer))


def _lengths(config: RunConfig, facts: Mapping[str, Any], problems: Problems, responses: Mapping[str, int]) -> None:
    limits = {
        "rollout.max_model_len": getattr(config.rollout, "max_model_len", None),
        "the model's max_position_embeddings": facts.get("max_position_embeddings"),
    }
    known = {name: limit for name, limit in limits.items() if limit is not None}
    for key, response in responses.items():
        longest = config.data.max_prompt_tokens + response
        for name, limit in known.items():
            if longest > limit:
                found = f"found {response}; with data.max_prompt_tokens={config.data.max_prompt_tokens} that makes"
                problems.add(key, f"{found} {longest} tokens, and {name} is {limit}")


def _local(config: RunConfig, roles: tuple[str, ...], problems: Problems) -> None:
    for name in config.ray.changed("address", "num_cpus"):
        found = getattr(config.ray, name)
        problems.add(f"ray.{name}", f"found {found!r}; runtime=local starts no Ray: remove it, or runtime=ray")
    for role in model_roles(config, roles):
        if (name := _field(config, role, "name")) not in (None, "torch"):
            key = f"{engine_key(config, role)}.name"
            problems.add(key, f"found {name!r}; runtime=local allowed: torch (engine=torch)")
    engine = getattr(config.rollout, "engine", None)
    if "rollout" in roles and engine not in (None, "hf"):
        problems.add("rollout.engine", f"found {engine!r}; runtime=local allowed: hf (rollout=hf)")
    for role in roles:
        place = config.place(role)
        if place is not None and place.pool in config.placement.pools and config.ranks(role) != 1:
            found = config.ranks(role)
            problems.add(f"placement.roles.{role}", f"found {found} ranks; runtime=local allowed: 1 (placement=single)")
