"""The composition root: configuration -> pools -> groups -> roles -> algorithm -> schedule -> trainer.

Workers, algorithms and the model builder arrive by dotted name from the configuration; nothing here imports them.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hybridflow.algorithm import Algorithm
from hybridflow.checkpoint.base_model import checkpoint_bytes, identities
from hybridflow.checkpoint.resume import Resumption
from hybridflow.checkpoint.store import CheckpointStore
from hybridflow.config.algorithm_checks import algorithm_context
from hybridflow.config.cross_checks import check_limits
from hybridflow.config.locate import import_name
from hybridflow.config.model_numbers import complete, folder_facts
from hybridflow.config.model_paths import local_model, local_tokenizer
from hybridflow.config.phases import engines_sleep, offloaded
from hybridflow.config.placement_checks import check_cuts
from hybridflow.config.problems import Problems
from hybridflow.config.run_config import RunConfig
from hybridflow.config.vocabularies import check_vocabulary
from hybridflow.controller.local_runtime import LocalRuntime
from hybridflow.controller.ray_runtime import RayRuntime
from hybridflow.data.prompts import PromptSource
from hybridflow.data.sources import open_source
from hybridflow.data.stored_rows import StoredRows
from hybridflow.data.tokenizers import BUILT_IN, load_tokenizer
from hybridflow.errors import ConfigError, HybridFlowError
from hybridflow.record import RunCheckpoints, RunRecord
from hybridflow.roles import ActorReference, Roles
from hybridflow.schedule.base import Schedule, Source
from hybridflow.schedule.offline import OfflineSchedule
from hybridflow.schedule.phases import Phases, PhaseSettings
from hybridflow.schedule.policy_sync import PolicySync
from hybridflow.schedule.sync import SyncSchedule, SyncSettings
from hybridflow.spans import span
from hybridflow.tracking.run_folder import RunFolder
from hybridflow.tracking.sinks import open_tracker
from hybridflow.trainer import Trainer

PROBE_TOKENS = 24
BUCKET_BYTES = 256 << 20
PROBE_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.05, "float64": 1e-4}
"""Nats. Two float32 engines differ by rounding alone; half precision rounds the weights themselves."""


@dataclass(frozen=True)
class Model:
    """What ranks load from, all of it on disk. own: folders of the role instances that bring a model of their own.
    tokenizer_name: `char`, `byte`, or a folder."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    tokenizer_name: str
    vocab_size: int
    own: Mapping[str, Path]


@dataclass(frozen=True)
class Session:
    """A run that is set up: its ranks are alive and its engines hold the policy.

    num_cores: CPUs that the pools hold, fractions added up. num_devices: their GPUs; without any, their cores.
    """

    config: RunConfig
    folder: RunFolder
    model: Model
    groups: Mapping[str, Any]
    schedule: Schedule
    checkpoints: RunCheckpoints
    num_cores: float
    num_devices: float


def run(config: RunConfig) -> int:
    """A whole run. Returns the process's exit status: 0, or after a failure that a person can read 2 where the
    configuration is to blame (one that may not go on with the folder's run, for example), else 1."""
    try:
        with opened(config) as session:
            _train(session)
    except HybridFlowError as error:
        print(error, file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


@contextmanager
def opened(config: RunConfig) -> Iterator[Session]:
    """Everything up to the first step; ranks and their children are gone when the block ends, however it ends."""
    torch.set_num_threads(1)
    folder = RunFolder.fresh(config.run_folder) if config.overwrite else RunFolder(config.run_folder)
    algorithm_class: type[Algorithm] = import_name(config.algorithm.target)
    names = config.with_ranks(algorithm_class.required_roles(config.algorithm.config))
    given = model_names(config, names)
    store = CheckpointStore(folder.checkpoints, config.trainer.keep_checkpoints)
    models = cache(lambda: identities({given[key]: path for key, path in model_folders(given).items()}))
    resumption = Resumption.find(store, config.resolved(), models) if config.resume == "auto" else None
    folder.begin(config.resolved(), resume=resumption is not None)
    model = prepare_model(config, folder, names)
    source = open_source(config.data, model.tokenizer, config.seed, folder.path / "data", algorithm_class.rows)
    extra = open_extra_data(config, algorithm_class, model, folder)
    runtime = make_runtime(config, folder.path)
    try:
        with span("start"):
            groups = make_groups(config, runtime, names, model)
            runtime.ready(list(groups.values()))
            context = algorithm_context(config, algorithm_class.online)
            data = {name: StoredRows(rows, runtime.store) for name, rows in extra.items()}
            algorithm = algorithm_class(config.algorithm.config, replace(context, data=data))
            schedule = make_schedule(config, algorithm, groups, runtime, model, source)
        checkpoints = make_checkpoints(config, folder, store, resumption, schedule, groups, model, models)
        yield Session(config, folder, model, groups, schedule, checkpoints, *cores_and_devices(config, names))
    finally:
        runtime.shutdown()


def _train(session: Session) -> None:
    config, folder, groups, checkpoints = session.config, session.folder, session.groups, session.checkpoints
    start = checkpoints.restore()
    with open_tracker(config.tracking, folder, config.resolved(), config.trainer.steps) as tracker:
        record = RunRecord(
            folder, tracker, groups, config.tracking, checkpoints.totals, session.num_cores, session.num_devices
        )
        Trainer(config.trainer, session.schedule, record, checkpoints, session.num_devices).run(start)
    if config.trainer.export:
        with span("export"):
            session.schedule.finish()
            groups[import_name(config.algorithm.target).product].export(str(folder.model)).result()
            session.model.tokenizer.save_pretrained(str(folder.model))
    print(record.report(), flush=True)


def make_checkpoints(
    config: RunConfig, folder: RunFolder, store: CheckpointStore, resumption: Resumption | None, schedule: Schedule,
    groups: Mapping[str, Any], model: Model, models: Callable[[], dict[str, str]],
) -> RunCheckpoints:  # fmt: skip
    trained = {name: group for name, group in groups.items() if getattr(group.worker_class, "trainable", False)}
    return RunCheckpoints(
        store=store,
        folder=folder,
        resumption=resumption,
        schedule=schedule,
        trained=trained,
        config=config.resolved(),
        models=models() if config.trainer.checkpoint_every else {},
        first_bytes=sum(
            checkpoint_bytes(model.own.get(name, model.folder)) for name in trained if not config.has_adapter(name)
        ),
    )


def model_names(config: RunConfig, names: tuple[str, ...]) -> dict[str, str]:
    """Folders and hub ids that the run's models come from, by configuration key; none for a model from a config."""
    found = {f"instances.{name}.model": config.instances[name].model for name in names if name in config.instances}
    found["model.path"] = config.model.path
    return {key: name for key, name in found.items() if name is not None}


def model_folders(given: Mapping[str, str]) -> dict[str, Path]:
    """Hub ids become folders here."""
    return {key: local_model(name, key) for key, name in given.items()}


def prepare_model(config: RunConfig, folder: RunFolder, names: tuple[str, ...]) -> Model:
    """A model from a config is initialised once, by the run seed."""
    folders = model_folders(model_names(config, names))
    own = {name: path for name in names if (path := folders.get(f"instances.{name}.model")) is not None}
    tokenizer_name = config.model.tokenizer
    if tokenizer_name is not None and tokenizer_name not in BUILT_IN:
        tokenizer_name = str(local_tokenizer(tokenizer_name, "model.tokenizer"))
    if config.model.path is not None:
        from transformers import AutoConfig

        path = folders["model.path"]
        facts, tokenizer = AutoConfig.from_pretrained(path), load_tokenizer(tokenizer_name, str(path))
        _check_models(config, names, own, facts.to_dict(), tokenizer)
        return Model(path, tokenizer, tokenizer_name or str(path), facts.vocab_size, own)
    initial, tokenizer = folder.path / "initial_model", load_tokenizer(tokenizer_name)
    _check_models(config, names, own, {}, tokenizer)
    build = import_name(config.model.builder or "")
    build(config.model.config, initial, config.seed, tokenizer)
    return Model(initial, tokenizer, tokenizer_name or str(initial), len(tokenizer), own)


def _check_models(
    config: RunConfig, names: tuple[str, ...], own: Mapping[str, Path], facts: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> None:  # fmt: skip
    """What nobody could read before, of models that came from the hub only now. facts: the config of the run's model;
    empty for one that is made from a config, which was checked with it."""
    problems = Problems()
    if facts and "rollout" in names:
        check_limits(config, facts, problems, tokenizer)
    for name in names:
        check_cuts(config, name, complete(folder_facts(own[name])) if name in own else facts, problems)
    for name, path in own.items():
        check_vocabulary(f"instances.{name}.model", path, tokenizer, problems)
    problems.raise_if_any()


def open_extra_data(
    config: RunConfig, algorithm: type[Algorithm], model: Model, folder: RunFolder
) -> dict[str, PromptSource]:
    """What the algorithm reads beside the run's own data, by name."""
    return {
        name: open_source(config.extra_data[name], model.tokenizer, config.seed, folder.path / "data" / name, kind)
        for name, kind in algorithm.extra_rows(config.algorithm.config).items()
    }


def make_runtime(config: RunConfig, folder: Path) -> Any:
    if config.runtime == "local":
        return LocalRuntime(folder)
    return RayRuntime(folder, config.ray.address, config.ray.num_cpus, config.ray.call_timeout_s)


def cores_and_devices(config: RunConfig, names: tuple[str, ...]) -> tuple[float, float]:
    """Of the pools that the role instances use. Pools with fractions of a core share it."""
    pools = config.used_pools(names).values()
    cores = sum(pool.ranks * pool.cpus_per_rank for pool in pools)
    return cores, sum(pool.ranks * pool.gpus_per_rank for pool in pools) or cores


def probe_tolerance(config: RunConfig) -> float:
    """Largest difference of a probe log-prob, engine against trainer: that of the coarser of the two."""
    dtypes = (getattr(config.actor.engine, "dtype", "float32"), getattr(config.rollout, "dtype", "float32"))
    return max(PROBE_TOLERANCE[dtype] for dtype in dtypes)


def make_groups(config: RunConfig, runtime: Any, names: tuple[str, ...], model: Model) -> dict[str, Any]:
    """One worker group a role instance, in the pool that the placement names."""
    places = {name: place for name in names if (place := config.place(name)) is not None}
    pools = {}
    for pool_name, settings in config.used_pools(names).items():
        tenants = sum(place.pool == pool_name for place in places.values())
        pools[pool_name] = runtime.pool(
            pool_name, settings.ranks, cpus_per_bundle=settings.cpus_per_rank, gpus_per_bundle=settings.gpus_per_rank,
            max_groups=tenants,
        )  # fmt: skip
    groups = {}
    for name in names:
        worker_class = import_name(config.worker(name) or "")
        factory = partial(worker_class, **worker_arguments(config, name, model))
        pool = pools[places[name].pool]
        groups[name] = runtime.group(
            name, factory, pool, config.shape(name), bundles_per_rank=config.bundles_per_rank(name)
        )
    return groups


def worker_arguments(config: RunConfig, name: str, model: Model) -> Mapping[str, Any]:
    """What the constructor of a role's worker takes beside its context."""
    instance = config.instance(name)
    assert instance is not None, f"{name}: checked with the configuration"
    if instance.type == "rollout":
        lora = {"lora": config.actor.engine.lora} if config.has_adapter("actor") else {}  # type: ignore[attr-defined]
        own = {"model_folder": str(model.folder), "settings": config.rollout, "tokenizer": model.tokenizer_name}
        return {**own, **lora}
    if instance.type == "reward":
        return {"settings": instance.reward, "tokenizer": model.tokenizer_name}
    folder = {"model_folder": str(model.own.get(name, model.folder)), "settings": instance.engine}
    return folder | ({"tokenizer": model.tokenizer_name} if instance.type == "reward_model" else {})


def make_roles(config: RunConfig, algorithm: Algorithm, groups: Mapping[str, Any]) -> Roles:
    """The groups, and what stands for roles without ranks."""
    needed = algorithm.required_roles(algorithm.config)
    return Roles({**groups, **{name: ActorReference(groups["actor"]) for name in needed if config.shares_actor(name)}})


def make_schedule(
    config: RunConfig, algorithm: Algorithm, groups: Mapping[str, Any], runtime: Any, model: Model, source: Source
) -> Schedule:
    roles, count = make_roles(config, algorithm, groups), config.trainer.prompts_per_step
    if not algorithm.online:
        return OfflineSchedule(algorithm, roles, source, runtime.store, count)
    probe = [(7 * i + 3) % model.vocab_size for i in range(PROBE_TOKENS)]
    policy = PolicySync(
        groups["actor"], groups["rollout"], probe, probe_tolerance(config), BUCKET_BYTES,
        config.schedule.read_back_every,
    )  # fmt: skip
    names = tuple(groups)
    phases = Phases(policy, groups["rollout"], groups, PhaseSettings(engines_sleep(config), offloaded(config, names)))
    phases.restore(0)
    functions = [found.reward for name in groups if (found := config.instance(name)) is not None and found.reward]
    max_failure_share = min((function.max_failure_share for function in functions), default=1.0)
    settings = SyncSettings(count, config.seed, config.schedule.max_empty_steps, max_failure_share)
    return SyncSchedule(algorithm, roles, source, runtime.store, phases, settings)
