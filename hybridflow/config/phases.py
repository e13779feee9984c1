"""What gives memory back in which phase: the schedule's settings, and what they are where a person leaves them open."""

from hybridflow.algorithm import Algorithm
from hybridflow.config.problems import Problems, choice
from hybridflow.config.run_config import RunConfig
from hybridflow.roles import MemoryPart

OPEN: tuple[MemoryPart, ...] = ("gradients", "optimizer")
"""What a trained role offloads by default where it shares GPUs with the engines."""


def trained_roles(config: RunConfig, roles: tuple[str, ...]) -> list[str]:
    """Role instances of an online algorithm that have an optimizer."""
    return [role for role in roles if config.role_type(role) in ("actor", "critic")]


def engines_sleep(config: RunConfig) -> bool:
    """By default where engines share GPUs with the actor."""
    if config.schedule.sleep != "auto":
        return config.schedule.sleep == "always"
    return _shares_gpus(config, "actor")


def offloaded(config: RunConfig, roles: tuple[str, ...]) -> dict[str, tuple[MemoryPart, ...]]:
    """What each trained role gives back while engines generate; none is named in vain."""
    if config.schedule.offload is not None:
        return {role: tuple(parts) for role, parts in config.schedule.offload.items() if parts}
    return {role: OPEN for role in trained_roles(config, roles) if _shares_gpus(config, role)}


def check_phases(config: RunConfig, algorithm: type[Algorithm], roles: tuple[str, ...], problems: Problems) -> None:
    if not algorithm.online:
        for name in config.schedule.changed("sleep", "offload"):
            text = f"found {getattr(config.schedule, name)!r}; {config.algorithm.name} is offline, no engine generates"
            problems.add(f"schedule.{name}", f"{text}: remove it")
        return
    trained = trained_roles(config, roles)
    for role, parts in (config.schedule.offload or {}).items():
        key = f"schedule.offload.{role}"
        if role not in trained:
            problems.add(key, choice(role, trained))
        elif "weights" in parts and not on_gpus(config, role):
            text = "found 'weights'; engines read a CPU role's weights in its memory, where they must stay"
            problems.add(key, f"{text}: allowed {', '.join(OPEN)}")


def on_gpus(config: RunConfig, role: str) -> bool:
    place = config.place(role)
    pool = config.placement.pools.get(place.pool) if place is not None else None
    return pool is not None and pool.gpus_per_rank > 0


def _shares_gpus(config: RunConfig, role: str) -> bool:
    own, engines = config.place(role), config.place("rollout")
    return own is not None and engines is not None and own.pool == engines.pool and on_gpus(config, role)
