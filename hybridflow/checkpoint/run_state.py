"""All that the next step reads and no engine saves: it makes a resumed run the run that was not interrupted."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hybridflow.errors import CheckpointError, ConfigError
from hybridflow.settings import differences

FILE = "run_state.json"

# What a person may change between a run and its continuation: none of it alters what a finished step computed.
MAY_CHANGE = (
    "run_folder",
    "resume",
    "overwrite",
    "runtime",
    "ray",
    "placement",
    "schedule.offload",
    "schedule.read_back_every",
    "schedule.sleep",
    "tracking",
    "trainer.steps",
    "trainer.validate_every",
    "trainer.validate_before",
    "trainer.validation_prompts",
    "trainer.checkpoint_every",
    "trainer.keep_checkpoints",
    "trainer.export",
)


class RunState(BaseModel):
    """State after `step` finished steps. Everything is plain JSON, and is refused when JSON would change it.

    schedule: what the schedule's `state_dict()` returned: data cursor, policy version, the algorithm's controllers.
    models: `base_model.identities` of what the run began from; empty for a model that a config and the seed make.
    accuracy: held-out accuracies so far. accuracy_before: the one measured before the first step.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int = Field(ge=0)
    config: dict[str, Any]
    schedule: dict[str, Any] = {}
    versions: dict[str, str | None] = {}
    tokens_total: int = 0
    seconds_total: float = 0.0
    accuracy: list[float] = []
    accuracy_before: float | None = None
    models: dict[str, str] = {}

    def save(self, folder: Path) -> None:
        """Write `run_state.json`. Raises CheckpointError naming the field that is not finite or not plain JSON (a
        tuple, a number as key, an array)."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        for name, value in fields.items():
            try:
                kept = json.loads(json.dumps(value, allow_nan=False))
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"RunState.{name}: cannot be saved as JSON ({error}); got {value!r}") from error
            if kept != value:
                raise CheckpointError(f"RunState.{name}: JSON would change it from {value!r} to {kept!r}")
        (folder / FILE).write_text(json.dumps(fields, indent=1, allow_nan=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "RunState":
        try:
            return cls.model_validate_json((folder / FILE).read_bytes())
        except (OSError, ValidationError) as error:
            raise CheckpointError(
                f"{folder / FILE}: is no state of a run that this version can read ({error})"
            ) from error

    def check_config(self, config: Mapping[str, Any], may_change: Iterable[str] = MAY_CHANGE) -> list[str]:
        """Compare with the configuration of the run that resumes. Returns the keys that differ and may; raises
        ConfigError listing those that differ and may not. `may_change` holds dotted prefixes (`tracking`)."""
        prefixes = tuple(may_change)
        plain = json.loads(json.dumps(config, default=str))
        saved = json.loads(json.dumps(self.config, default=str))
        found = differences(saved, plain)
        allowed = [key for key in found if any(key == p or key.startswith(f"{p}.") for p in prefixes)]
        refused = [key for key in found if key not in allowed]
        if refused:
            listed = "\n".join(f"  {key}: saved {found[key][0]!r}, now {found[key][1]!r}" for key in refused)
            raise ConfigError(
                f"resume: the checkpoint of step {self.step} belongs to a run with another configuration:\n{listed}\n"
                f"Only these may change: {', '.join(prefixes)}. Set the values back, or start a new run folder"
            )
        return allowed

    def check_models(self, models: Mapping[str, str]) -> None:
        """Raises ConfigError naming each model whose weights are not those that the run began from."""
        changed = [
            f"  {name}: then {saved}, now {models.get(name, 'no such model')}"
            for name, saved in self.models.items()
            if models.get(name) != saved
        ]
        if changed:
            raise ConfigError(
                f"resume: the run of the checkpoint of step {self.step} began from other weights than are there now:\n"
                + "\n".join(changed)
                + "\nPut those weights back, or start a new run folder"
            )
