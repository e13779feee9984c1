"""The run's configuration: each room's own part, typed and closed to unknown keys."""

from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, SerializeAsAny, model_validator

from hybridflow.config.locate import name_of
from hybridflow.controller.coordinates import Shape
from hybridflow.controller.settings import RaySettings
from hybridflow.data.settings import DataSettings
from hybridflow.rewards.settings import RewardSettings
from hybridflow.roles import MemoryPart
from hybridflow.settings import Settings
from hybridflow.tracking.settings import TrackingSettings


class TrainerSettings(Settings):
    """How long, how much, and how often.

    prompts_per_step: prompts (offline: rows, or pairs) of one step. validate_every, checkpoint_every: in steps;
    0 is never. keep_checkpoints: the newest so many. export: write the trained model in Hugging Face format at the end.
    """

    steps: int = Field(100, gt=0)
    prompts_per_step: int = Field(32, gt=0)
    validate_every: int = Field(0, ge=0)
    validate_before: bool = False
    validation_prompts: int = Field(128, gt=0)
    checkpoint_every: int = Field(0, ge=0)
    keep_checkpoints: int = Field(2, ge=1)
    export: bool = True

    @property
    def validates(self) -> bool:
        return self.validate_before or self.validate_every > 0


class ModelSettings(Settings):
    """path: a folder, or a hub id that is fetched once before ranks start; config: a Hugging Face config for a model
    with random weights. Exactly one.

    tokenizer: `char`, `byte`, a folder or hub id; null takes the one at `path`. builder: dotted name of the function
    that makes a model from `config`; a model at `path` needs none.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    builder: str | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.config is None):
            found = "neither" if self.path is None else "both"
            remedy = "model=pretrained model.path=<folder or hub id>, or model=tiny for a random one"
            raise ValueError(f"path, config: found {found}; set exactly one: {remedy}")
        if self.path is None and self.builder is None:
            raise ValueError("builder: found null with a model from a config; set a function, as model=tiny does")
        if self.path is None and self.tokenizer is None:
            raise ValueError("tokenizer: found null with a model from a config; set char, byte, a folder or a hub id")
        return self


RoleType = Literal["actor", "critic", "reference", "reward", "reward_model", "rollout"]
MODEL_TYPES: tuple[RoleType, ...] = ("actor", "critic", "reference", "reward_model")


class RoleSettings(Settings):
    """engine: the shared `engine` section with this role's own changes."""

    engine: SerializeAsAny[Settings]


class InstanceSettings(Settings):
    """A role instance: one of a role type, under a name that the algorithm calls (`cost`, `cost_critic`, `teacher`).

    model: folder or hub id that it loads; null is the run's own model. engine: for types that run a model. reward: for
    type `reward`, a function. worker: the class that runs it, where that is not its type's in `workers`.
    """

    type: RoleType
    model: str | None = None
    engine: SerializeAsAny[Settings] | None = None
    reward: RewardSettings | None = None
    worker: str | None = None

    def problems(self) -> list[str]:
        if self.type == "rollout":
            return ["type: found 'rollout'; a run has one, in its own section: actor, critic, reference, reward_model"]
        if self.type == "reward":
            found = ["reward: missing; type 'reward' scores with a function"] if self.reward is None else []
            return found + (["model: type 'reward' is a function; use reward_model for a model"] if self.model else [])
        return ["reward: a function is for type 'reward' alone"] if self.reward is not None else []


class AlgorithmSpec(Settings):
    """target: dotted name of the algorithm's class; config: an instance of its `Config`."""

    target: str
    name: str
    config: SerializeAsAny[Settings]


class PoolSettings(Settings):
    """Bundles of a placement group, one a rank. Fractions let several pools share a core."""

    ranks: int = Field(gt=0)
    cpus_per_rank: float = Field(1.0, gt=0)
    gpus_per_rank: float = Field(0.0, ge=0)


class RolePlacement(Settings):
    """ranks: null takes all that the pool has room for. pipeline, tensor: sizes p and t of a role that runs a model;
    the data ranks are ranks / (pipeline x tensor).

    The rollout's ranks are its replicas. Each hosts the workers of one engine, rollout.tensor_parallel_size of them,
    and takes as many of the pool's bundles.
    """

    pool: str
    ranks: int | None = Field(None, gt=0)
    pipeline: int = Field(1, ge=1)
    tensor: int = Field(1, ge=1)


class PlacementSettings(Settings):
    """Which role instance runs in which pool, on how many ranks."""

    pools: dict[str, PoolSettings] = Field(min_length=1)
    roles: dict[str, RolePlacement]


class ScheduleSettings(Settings):
    """What may run while what. `sync`: one stage after another, samples always from the newest policy.

    max_empty_steps: steps in a row that may end without a group that the algorithm takes; then the run stops.
    read_back_every: syncs between two comparisons, bit for bit, of the weights that the engines compute with and the
    actor's; 0 is never.
    sleep: whether engines give weights and cache back while others train; auto: where they share GPUs with the actor.
    vLLM on a CPU has nothing to give. offload: what trained roles give back while engines generate, such as
    {actor: [optimizer, gradients]}; null is both where the role shares GPUs with the engines, else nothing. From a GPU
    it goes to the host's memory, from there to a file.
    """

    name: Literal["sync"] = "sync"
    max_empty_steps: int = Field(3, ge=1)
    read_back_every: int = Field(0, ge=0)
    sleep: Literal["auto", "always", "never"] = "auto"
    offload: dict[str, list[MemoryPart]] | None = None


class GeneralSettings(Settings):
    """What belongs to no section.

    runtime: `ray`, or `local` (one process, no Ray). resume: `auto` goes on from the run folder's newest checkpoint.
    overwrite: a run folder that holds another run is emptied first. workers: the worker class of each role type, or of
    one role instance, by dotted name.
    """

    runtime: Literal["ray", "local"] = "ray"
    seed: int = Field(0, ge=0)
    run_folder: Path
    resume: Literal["auto", "never"] = "auto"
    overwrite: bool = False
    workers: dict[str, str] = Field(min_length=1)


class RunConfig(GeneralSettings):
    """A whole run. Made by `hybridflow.config.validate.validate`, which reports every problem at once."""

    trainer: TrainerSettings
    algorithm: AlgorithmSpec
    model: ModelSettings
    actor: RoleSettings
    critic: RoleSettings
    reference: RoleSettings
    instances: dict[str, InstanceSettings]
    rollout: SerializeAsAny[Settings]
    placement: PlacementSettings
    schedule: ScheduleSettings
    data: DataSettings
    extra_data: dict[str, DataSettings]
    reward: RewardSettings
    tracking: TrackingSettings
    ray: RaySettings

    def instance(self, name: str) -> InstanceSettings | None:
        """What plays the role called `name`; None where the configuration has no such instance."""
        if name in self.instances:
            return self.instances[name]
        usual = {
            "actor": InstanceSettings(type="actor", engine=self.actor.engine),
            "critic": InstanceSettings(type="critic", engine=self.critic.engine),
            "reference": InstanceSettings(type="reference", engine=self.reference.engine),
            "reward": InstanceSettings(type="reward", reward=self.reward),
            "rollout": InstanceSettings(type="rollout"),
        }
        return usual.get(name)

    def role_type(self, name: str) -> RoleType | None:
        found = self.instance(name)
        return found.type if found else None

    def worker(self, name: str) -> str | None:
        """The class that runs the instance, by name: its own, else its own entry in `workers`, else that of its type.
        An instance under the name of another type (a reward model called `reward`) has no entry of its own there."""
        kind, own = self.role_type(name), self.instances[name].worker if name in self.instances else None
        entry = self.workers.get(name) if name == kind or name not in get_args(RoleType) else None
        return own or entry or self.workers.get(kind or "")

    def has_adapter(self, name: str) -> bool:
        """Whether the instance's engine trains an adapter beside frozen weights."""
        found = self.instance(name)
        return found is not None and getattr(found.engine, "lora", None) is not None

    def shares_actor(self, name: str) -> bool:
        """The role `reference`, unless an instance brings a model or a worker for it, is the actor's own weights with
        the adapter off where the actor trains an adapter: it has no ranks of its own."""
        explicit = self.instances.get(name)
        brings = explicit is not None and (explicit.model is not None or explicit.worker is not None)
        return name == "reference" and not brings and self.has_adapter("actor")

    def with_ranks(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the instances that have ranks of their own."""
        return tuple(name for name in names if not self.shares_actor(name))

    def placed_as(self, name: str) -> str:
        """The entry of the placement that says where the instance runs: its own, else that of its type's usual one."""
        kind = self.role_type(name) or ""
        return name if name in self.placement.roles else {"reward_model": "reward"}.get(kind, kind)

    def place(self, name: str) -> RolePlacement | None:
        return self.placement.roles.get(self.placed_as(name))

    def bundles_per_rank(self, name: str) -> int:
        """Of the pool: a rollout rank takes one for each worker of its engine."""
        return getattr(self.rollout, "tensor_parallel_size", 1) if self.role_type(name) == "rollout" else 1

    def ranks(self, name: str) -> int:
        place = self.place(name)
        assert place is not None, f"{name} has no placement"
        return place.ranks or self.placement.pools[place.pool].ranks // self.bundles_per_rank(name)

    def shape(self, name: str) -> Shape:
        """p, t and d of the instance's group; the placement is checked to divide."""
        place = self.place(name)
        assert place is not None, f"{name} has no placement"
        return Shape(place.pipeline, place.tensor, self.ranks(name) // (place.pipeline * place.tensor))

    def used_pools(self, names: tuple[str, ...]) -> dict[str, PoolSettings]:
        """The pools that at least one of the instances runs in."""
        used = {place.pool for name in names if (place := self.place(name)) is not None}
        return {name: pool for name, pool in self.placement.pools.items() if name in used}

    def resolved(self) -> dict[str, Any]:
        """Plain data, every default written out, that validates to this same configuration."""
        plain = self.model_dump(mode="json")
        for role in ("actor", "critic", "reference"):
            plain[role]["engine"]["settings"] = name_of(type(getattr(self, role).engine))
        for name, instance in self.instances.items():
            if instance.engine is not None:
                plain["instances"][name]["engine"]["settings"] = name_of(type(instance.engine))
        plain["rollout"]["settings"] = name_of(type(self.rollout))
        plain["algorithm"] = {k: v for k, v in plain["algorithm"].items() if k != "config"} | plain["algorithm"][
            "config"
        ]
        return plain
