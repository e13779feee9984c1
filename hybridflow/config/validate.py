"""From plain data to a `RunConfig`, or one ConfigError with everything that is wrong."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from hybridflow.algorithm import Algorithm
from hybridflow.config.cross_checks import cross_check
from hybridflow.config.problems import Problems, add_validation, dotted_keys, join, unknown_key
from hybridflow.config.run_config import (
    MODEL_TYPES,
    AlgorithmSpec,
    GeneralSettings,
    InstanceSettings,
    ModelSettings,
    PlacementSettings,
    RoleSettings,
    RunConfig,
    ScheduleSettings,
    TrainerSettings,
)
from hybridflow.config.sections import Sections
from hybridflow.controller.settings import RaySettings
from hybridflow.data.settings import DataSettings
from hybridflow.rewards.settings import RewardSettings
from hybridflow.settings import Settings
from hybridflow.tracking.settings import TrackingSettings

TYPED: dict[str, type[Settings]] = {
    "trainer": TrainerSettings,
    "model": ModelSettings,
    "placement": PlacementSettings,
    "schedule": ScheduleSettings,
    "data": DataSettings,
    "reward": RewardSettings,
    "tracking": TrackingSettings,
    "ray": RaySettings,
}
MODEL_ROLES = ("actor", "critic", "reference")
SHARED_ENGINE = "engine"


def validate(raw: Mapping[str, Any], problems: Problems | None = None) -> RunConfig:
    """The typed configuration. `problems` may hold what composing found already. Raises ConfigError."""
    problems = problems or Problems()
    parts = Parts(raw, problems)
    config = parts.build()
    if config is not None:
        cross_check(config, parts.algorithm_class, problems)
    problems.raise_if_any()
    assert config is not None
    return config


class Parts:
    """Validates each section with the class that owns it."""

    def __init__(self, raw: Mapping[str, Any], problems: Problems) -> None:
        self._raw = raw
        self._problems = problems
        self._known = dotted_keys(raw)
        self._sections = Sections(problems, self._known)
        self.algorithm_class: type[Algorithm] = Algorithm  # type: ignore[type-abstract]  # until one is found

    def build(self) -> RunConfig | None:
        """None when a section is missing or wrong."""
        parts = {name: self._sections.typed(cls, self._raw.get(name, {}), name) for name, cls in TYPED.items()}
        parts["algorithm"] = self._algorithm()
        parts["rollout"] = self._sections.named(self._raw.get("rollout"), "rollout")
        if self._raw.get(SHARED_ENGINE):
            self._sections.named(self._raw[SHARED_ENGINE], SHARED_ENGINE)
        parts |= {role: self._role(role) for role in MODEL_ROLES}
        parts["instances"] = self._instances()
        parts["extra_data"] = self._extra_data()
        general = self._general(parts["algorithm"])
        if general is None or any(part is None for part in parts.values()):
            return None
        return RunConfig(**dict(general), **parts)

    def _general(self, algorithm: AlgorithmSpec | None) -> GeneralSettings | None:
        allowed = [*RunConfig.model_fields, SHARED_ENGINE]
        for name in self._raw:
            if name not in allowed:
                self._problems.add(name, unknown_key(name, allowed, self._sections.elsewhere(name)))
        plain = {name: self._raw[name] for name in GeneralSettings.model_fields if name in self._raw}
        default = f"runs/{datetime.now():%Y-%m-%d-%H%M%S}-{algorithm.name if algorithm else 'run'}"
        plain["run_folder"] = plain.get("run_folder") or default
        return self._sections.typed(GeneralSettings, plain, "")

    def _role(self, role: str) -> RoleSettings | None:
        """A model role's section: `engine` alone."""
        raw = self._raw.get(role) or {}
        if not isinstance(raw, Mapping):
            self._problems.add(role, f"found {raw!r}; allowed: a mapping with `engine`")
            return None
        for name in set(raw) - {"engine"}:
            self._problems.add(
                join(role, str(name)), unknown_key(str(name), ["engine"], self._sections.elsewhere(role))
            )
        engine = self._engine(raw.get("engine"), f"{role}.engine")
        return RoleSettings(engine=engine) if engine else None

    def _engine(self, own: Any, key: str) -> Any:
        """The shared engine section under a role's own changes; a role may also name another settings class."""
        own = own or {}
        if not isinstance(own, Mapping):
            self._problems.add(key, f"found {own!r}; allowed: a mapping")
            return None
        shared = self._raw.get(SHARED_ENGINE) or {}
        replaced = "settings" in own and own["settings"] != shared.get("settings")
        here = Problems()
        inherited = set(shared) - set(own) if own.get("name", shared.get("name")) != shared.get("name") else ()
        engine = Sections(here, self._known).named(own if replaced else merged(shared, own), key, inherited)
        said = {(problem.key.removeprefix(SHARED_ENGINE), problem.text) for problem in self._problems.found}
        for problem in here.found:
            if replaced or (problem.key.removeprefix(key), problem.text) not in said:
                self._problems.add(problem.key, problem.text)  # a mistake in the shared section is said only once
        return engine

    def _instances(self) -> dict[str, InstanceSettings] | None:
        """Further role instances by name; those that run a model get an engine as the usual roles do."""
        raw = self._raw.get("instances") or {}
        if not isinstance(raw, Mapping):
            self._problems.add("instances", f"found {raw!r}; allowed: a mapping from name to `type` and its settings")
            return None
        found: dict[str, InstanceSettings] = {}
        for name, fields in raw.items():
            key = join("instances", str(name))
            if not isinstance(fields, Mapping):
                self._problems.add(key, f"found {fields!r}; allowed: a mapping with `type`")
                continue
            plain = {k: v for k, v in fields.items() if k != "engine"}
            section = self._sections.typed(InstanceSettings, plain, key)
            if section is None:
                continue
            if section.type in MODEL_TYPES:
                engine = self._engine(fields.get("engine"), f"{key}.engine")
                section = section.model_copy(update={"engine": engine}) if engine else None
            elif fields.get("engine"):
                self._problems.add(f"{key}.engine", f"type {section.type!r} runs no model; remove it")
            if section is not None:
                found[str(name)] = section
        return found if len(found) == len(raw) else None

    def _extra_data(self) -> dict[str, DataSettings] | None:
        """Further row sources by the name that the algorithm reads them under."""
        raw = self._raw.get("extra_data") or {}
        if not isinstance(raw, Mapping):
            self._problems.add("extra_data", f"found {raw!r}; allowed: a mapping from name to the settings of `data`")
            return None
        found = {
            str(n): self._sections.typed(DataSettings, fields, join("extra_data", str(n))) for n, fields in raw.items()
        }
        return None if any(section is None for section in found.values()) else found

    def _algorithm(self) -> AlgorithmSpec | None:
        raw = self._raw.get("algorithm")
        if not isinstance(raw, Mapping):
            self._problems.add("algorithm", f"found {raw!r}; allowed: a mapping with `target`")
            return None
        cls = self._sections.imported(raw.get("target"), "algorithm.target", Algorithm)
        if cls is None:
            return None
        if missing := sorted(getattr(cls, "__abstractmethods__", ())):
            text = f"found {raw['target']!r}, which has no {', '.join(missing)}: an algorithm defines it"
            self._problems.add("algorithm.target", text)
            return None
        self.algorithm_class = cls
        fields = {k: v for k, v in raw.items() if k not in ("target", "name")}
        try:
            config = cls.Config.model_validate(fields)
        except ValidationError as error:
            add_validation(self._problems, error, cls.Config, "algorithm", self._sections.elsewhere("algorithm"))
            return None
        for line in cls.problems(config):
            self._problems.add_line(line, "algorithm")
        for name, reader in config.unread().items():
            text = f"found {getattr(config, name)!r}; only {reader} reads it: remove it, or set {reader}"
            self._problems.add(f"algorithm.{name}", text)
        return AlgorithmSpec(target=raw["target"], name=str(raw.get("name") or cls.__name__.lower()), config=config)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, mapping by mapping."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result
