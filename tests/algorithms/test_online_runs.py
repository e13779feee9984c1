"""Every online algorithm takes three real steps in one process: torch engine, Hugging Face generation, a tiny model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridflow import cli
from hybridflow.tracking.metrics_catalogue import describe

LOCAL = ["runtime=local", "engine=torch", "rollout=hf", "placement=single", "tracking.console=false"]
TINY = [
    "model=tiny", "model.config.hidden_size=32", "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=1", "trainer.prompts_per_step=4", "trainer.steps=3", "trainer.export=false",
    "rollout.sampling.max_response_tokens=8", "engine.optimizer.lr=1e-2",
]  # fmt: skip
SCORE = '''
"""Scores that a random model gets all over: how many of its characters are digits, letters, and how long it is."""


def digits(prompt, response, answer, **row):
    return sum(c.isdigit() for c in response) / (1 + len(response))


def cost(prompt, response, answer, **row):
    return float(sum(c.islower() for c in response))
'''
COST = "+instances.cost={type: reward, reward: {function: score.py:cost}}"
TEXTS = "+extra_data.ptx={arithmetic: {operations: ['-'], num_train: 50, num_validation: 1}, format: raw}"
FORCED = "+rollout.sampling.interruption={after_tokens: 5, text: '=', answer_tokens: 3}"
RUNS: dict[str, list[str]] = {
    "ppo": ["algorithm.adaptive_kl={target: 0.1, horizon: 100}", "algorithm.critic_warmup_steps=1"],
    "grpo": [], "dr_grpo": ["algorithm.mini_batches=2"], "rloo": ["algorithm.epochs=2"], "reinforce_pp": [],
    "reinforce_pp_baseline": [], "remax": ["algorithm.samples_per_prompt=3"], "opo": [], "gpg": [],
    "dapo": ["algorithm.overlong_buffer=4", "algorithm.max_draws=2"], "gspo": ["algorithm.mini_batches=2"],
    "gmpo": ["algorithm.mini_batches=2", "algorithm.correction={kind: tis, level: geometric}"],
    "sapo": ["algorithm.mini_batches=2", "algorithm.rejection={bound: 10.0}"], "cispo": ["algorithm.mini_batches=2"],
    "awr": ["algorithm.mini_batches=2"], "scale_rl": [FORCED, "algorithm.mini_batches=2"],
    "safe_rlhf": [COST, "algorithm.cost_limit=1.0"],
    "ppo_ptx": [TEXTS, "algorithm.ptx_coef=0.5", "algorithm.ptx_rows=6"],
}  # fmt: skip
LOGGED = {
    "ppo": {"critic/vf_explained_var", "kl/coefficient", "kl/reward_kl"},
    "gmpo": {"correction/ratio_mean", "correction/ratio_max", "correction/cut_share", "correction/effective_samples"},
    "sapo": {"correction/rejected_share", "correction/row_ratio_mean", "correction/row_ratio_max"},
    "safe_rlhf": {"cost/mean", "cost/multiplier", "cost_critic/vf_loss", "cost_critic/vf_explained_var",
                  "cost_critic/loss", "cost_critic/grad_norm", "cost_critic/lr", "critic/vf_loss", "critic/loss"},
    "ppo_ptx": {"actor/nll", "actor/pg_loss"},
    "scale_rl": {"response_length/interrupted_share"},
}  # fmt: skip
MUST_MOVE = {"actor/loss", "actor/grad_norm", "actor/entropy", "reward/mean"}


@pytest.mark.parametrize("name", list(RUNS))
def test_three_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = train(name, tmp_path, monkeypatch)
    assert len(steps) == 3
    for metrics in steps:
        unknown = [key for key in metrics if describe(key) is None]
        assert unknown == []
        assert all(math.isfinite(value) for value in metrics.values()), metrics
    learnt = steps[1:] if name == "ppo" else steps  # the actor waits one step there
    assert ("actor/loss" in steps[0]) == (learnt is steps)
    assert all({"actor/loss", *LOGGED.get(name, ())} <= metrics.keys() for metrics in learnt)
    assert [metrics["sync/version"] for metrics in steps] == [1, 2, 3]
    for key in MUST_MOVE:
        assert len({metrics[key] for metrics in learnt}) > 1, key


def train(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> list[dict[str, Any]]:
    (folder / "score.py").write_text(SCORE)
    monkeypatch.chdir(folder)
    samples = [] if any("samples_per_prompt" in change for change in RUNS[name]) else ["algorithm.samples_per_prompt=4"]
    given = [f"algorithm={name}", "reward=function", "reward.function=score.py:digits", *samples, *RUNS[name], *more]
    assert cli.main(["train", *LOCAL, *TINY, *given, f"run_folder={folder / 'run'}"]) == 0
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["metrics"] for line in lines]


@pytest.mark.parametrize("name", ["ppo_ptx", "safe_rlhf", "scale_rl"])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each keeps between steps (a second data source, a dual variable, a pass-rate history) survives a stop."""
    often = ["trainer.checkpoint_every=1"]
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = train(name, tmp_path / "whole", monkeypatch, *often)
    train(name, tmp_path / "parts", monkeypatch, *often, "trainer.steps=2")
    parts = train(name, tmp_path / "parts", monkeypatch, *often)
    assert strip(parts[-1]) == strip(whole[-1])


def strip(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.startswith(("timing_s/", "perf/"))}


def test_samples_show_what_was_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A response that uses up its 5 tokens goes on behind `=`, which no version sampled."""
    train("scale_rl", tmp_path, monkeypatch, "trainer.steps=1")
    lines = (tmp_path / "run/samples/step-000001.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    forced = [row for row in rows if -1 in row["versions"][row["prompt_length"] :]]
    assert len(rows) == 16 and forced
    for row in forced:
        at = row["prompt_length"] + 5
        assert row["versions"][at] == -1 and row["versions"].count(-1) == row["prompt_length"] + 1
        assert row["versions"][row["prompt_length"] : at] == [0] * 5
        assert 2 <= len(row["tokens"]) - at <= 4  # the forced token, and at most three of an answer


def test_remax_draws_one_greedy_sample_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fourth of each prompt is what the model itself finds likeliest, token by token."""
    train("remax", tmp_path, monkeypatch, "trainer.steps=1")
    rows = [json.loads(line) for line in (tmp_path / "run/samples/step-000001.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/initial_model")
    likeliest = []
    for row in rows:
        with torch.no_grad():
            chosen = model(torch.tensor([row["tokens"]])).logits[0].argmax(-1).tolist()
        start = row["prompt_length"]
        likeliest.append(chosen[start - 1 : -1] == row["tokens"][start:])
    assert likeliest == [row["sample"] == 3 for row in rows]
