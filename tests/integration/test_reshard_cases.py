"""The six cases of `make reshard-cases` on one Ray cluster: engine and trainer agree, and all cases with each other."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybridflow import launch
from hybridflow.config.layout_table import reshard
from hybridflow.config.load import load
from hybridflow.config.run_config import RunConfig

PROGRAM = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/reshard_cases.py"))
CASES, LIMIT = PROGRAM["CASES"], PROGRAM["LIMIT"]
pytestmark = pytest.mark.timeout(1500)  # up to ten processes on two cores


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Callable[[str], RunConfig]:
    """Runs a case when it is first asked for."""
    done: dict[str, RunConfig] = {}

    def run(name: str) -> RunConfig:
        if name not in done:
            folder = tmp_path_factory.mktemp(name) / "run"
            config = load([*PROGRAM["COMMON"], *CASES[name].overrides, f"run_folder={folder}"])
            assert launch.run(config) == 0
            done[name] = config
        return done[name]

    return run


def samples_of(folder: Path, step: int) -> dict[Any, tuple[list[int], float]]:
    rows = [json.loads(line) for line in (folder / f"samples/step-{step:06d}.jsonl").read_text().splitlines()]
    return {index: (row["tokens"], row["reward"]) for index, row in enumerate(rows)}


@pytest.mark.parametrize("name", CASES)
def test_engines_and_trainer_agree(name: str, finished: Callable[[str], RunConfig]) -> None:
    config = finished(name)
    planned, steps = reshard(config), PROGRAM["steps_of"](config.run_folder)
    assert [step["sync/version"] for step in steps] == [1, 2]
    assert planned is not None and {step["sync/bytes"] for step in steps} == {planned.total}, "what `check` prints"
    assert min(step["actor/grad_norm"] for step in steps) > 1e-3, "the weights must move"
    assert PROGRAM["largest_difference"](config.run_folder) <= LIMIT


def test_every_layout_is_the_same_training(finished: Callable[[str], RunConfig]) -> None:
    """The same seeds and, but for rounding, the same weights: the same tokens in both steps and the same losses."""
    first, *others = (finished(name).run_folder for name in CASES)
    for other in others:
        for step in (1, 2):
            assert samples_of(other, step) == samples_of(first, step), (other, step)
        for one, two in zip(PROGRAM["steps_of"](first), PROGRAM["steps_of"](other), strict=True):
            for metric in ("actor/loss", "actor/grad_norm"):
                assert two[metric] == pytest.approx(one[metric], rel=1e-4, abs=1e-6), (other, metric)
