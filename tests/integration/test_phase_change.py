"""Whole runs whose engines sleep and whose trained roles offload learn bit by bit as runs where nothing leaves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hybridflow import cli

LOCAL = ["runtime=local", "engine=torch", "rollout=hf", "placement=single", "tracking.console=false"]
SMALL = ["model.config.hidden_size=32", "model.config.intermediate_size=64", "model.config.num_hidden_layers=2"]
RUN = ["algorithm=ppo", "trainer.prompts_per_step=4", "trainer.validation_prompts=8", "engine.optimizer.lr=1e-3"]
REWARD = "def score(prompt, response, answer, **row):\n    return sum(letter.isdigit() for letter in response) / 8\n"
"""Some of it for every sample, so that all weights move."""
CYCLE = ["schedule.sleep=always", "schedule.offload={actor: [optimizer, gradients], critic: [optimizer, gradients]}"]


def train(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    reward = folder.with_suffix(".py")
    reward.write_text(REWARD)
    dense = ["reward=function", f"reward.function={reward}:score", f"run_folder={folder}"]
    assert cli.main(["train", *LOCAL, *SMALL, *RUN, *dense, *overrides]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["metrics"] for line in lines if "actor/loss" in line["metrics"]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, train(folder, "trainer.steps=3")


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_is_the_same_with_validations_checkpoints_and_export_between(
    plain: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, expected = plain
    often = ["trainer.validate_before=true", "trainer.validate_every=1", "trainer.checkpoint_every=1"]
    found = train(tmp_path / "run", "trainer.steps=3", *CYCLE, *often)
    for ours, theirs in zip(found, expected, strict=True):
        assert {"timing_s/sleep", "timing_s/wake", "timing_s/offload", "timing_s/onload"} <= ours.keys()
        for name in ("actor/grad_norm", "critic/loss", "reward/mean", "response_length/mean", "sync/version"):
            assert ours[name] == theirs[name], name
    assert expected[-1]["actor/grad_norm"] > 0
    assert same_weights(tmp_path / "run", folder)
    assert not same_weights(tmp_path / "run", with_initial(tmp_path / "run"))


def test_an_adapters_run_is_the_same_and_its_engines_keep_what_is_sent_once(tmp_path: Path) -> None:
    lora = ["+actor.engine.lora={rank: 2}", "trainer.steps=2"]
    expected = train(tmp_path / "plain", *lora)
    found = train(tmp_path / "run", *lora, *CYCLE, "trainer.checkpoint_every=1")
    assert found[-1]["actor/grad_norm"] == expected[-1]["actor/grad_norm"] > 0
    assert found[-1]["sync/bytes"] == expected[-1]["sync/bytes"] > 0
    assert same_weights(tmp_path / "run", tmp_path / "plain")


def with_initial(run: Path) -> Path:
    """Where the model that the run began with lies as its result does."""
    beside = run.parent / "initial"
    beside.mkdir(exist_ok=True)
    (beside / "model").symlink_to(run / "initial_model")
    return beside


def test_a_run_goes_on_from_its_checkpoint(plain: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    """And may begin or cease to give memory back there."""
    run = tmp_path / "run"
    for steps, settings in ((1, CYCLE), (2, CYCLE), (3, [])):
        train(run, f"trainer.steps={steps}", "trainer.checkpoint_every=1", *settings)
    assert same_weights(run, plain[0])
