"""Every algorithm's YAML is its documentation: it lists exactly the fields that can be set, with their defaults."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import test_distillation_runs
import test_offline_runs
import test_online_runs
import yaml

CONF = Path(__file__).resolve().parents[2] / "conf" / "algorithm"
FILES = sorted(CONF.glob("*.yaml"))
OTHER_VALUES = {"iterative_dpo": {"samples_per_prompt", "mini_batches"}}
"""What a file sets otherwise on purpose: it is another file's algorithm with these values."""


def entry(file: Path) -> dict[str, Any]:
    found = yaml.safe_load(file.read_text())
    return found["algorithm"] if file.read_text().startswith("# @package _global_") else found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_file_lists_every_field_with_its_default(file: Path) -> None:
    given = entry(file)
    module, _, name = given.pop("target").rpartition(".")
    config = getattr(importlib.import_module(module), name).Config
    assert given.pop("name") == file.stem
    assert sorted(given) == sorted(config.model_fields)
    written, default = config.model_validate(given), config()
    differing = {field for field in given if getattr(written, field) != getattr(default, field)}
    assert differing == OTHER_VALUES.get(file.stem, set())


def test_all_online_algorithms_have_a_file() -> None:
    names = {file.stem for file in FILES}
    assert names >= {
        "ppo", "grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "remax", "opo", "gpg", "dapo",
        "gspo", "gmpo", "sapo", "cispo", "scale_rl", "safe_rlhf", "awr", "ppo_ptx",
    }  # fmt: skip


def test_every_file_is_of_an_algorithm_that_takes_three_real_steps() -> None:
    """In one of the three modules that run them; a new file goes into its list."""
    offline = test_offline_runs.OFFLINE | test_offline_runs.ONLINE
    given = [text for run in (*offline.values(), *test_distillation_runs.RUNS.values()) for text in run[0]]
    named = {text.removeprefix("algorithm=") for text in given if text.startswith("algorithm=")}
    assert named | set(test_online_runs.RUNS) == {file.stem for file in FILES}
