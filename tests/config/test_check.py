import os
import shutil
from pathlib import Path

import pytest

from hybridflow.config.check import report
from hybridflow.config.load import load

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def plugin(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copy(HERE / "toy_plugin.py", tmp_path)
    (tmp_path / "conf" / "algorithm").mkdir(parents=True)
    (tmp_path / "conf" / "algorithm" / "toy.yaml").write_text("target: toy_plugin.Toy\nsamples: 6\n")
    return tmp_path / "conf"


def lines(config):
    return {
        key.strip(): value.strip() for key, _, value in (line.partition("  ") for line in report(config).splitlines())
    }


def test_the_arithmetic_of_a_step(plugin):
    """10 prompts x 6 samples = 60 rows of 20 + 30 tokens; 10 rows an update, 2 epochs; 3 ranks, 120 tokens each."""
    config = load(
        ["algorithm=toy", "trainer.prompts_per_step=10", "trainer.steps=3", "data.max_prompt_tokens=20",
         "rollout.sampling.max_response_tokens=30", "placement.pools.all.ranks=3", "engine.tokens_per_micro_batch=120"],
        plugin,
    )  # fmt: skip
    found = lines(config)
    assert found["prompts a step"] == "10"
    assert found["samples a step"] == "10 prompts x 6 = 60"
    assert found["tokens a step"] == "at most 60 x 50 = 3000"
    assert found["optimizer steps a step"].startswith("12, each of at most 10 sequences")
    assert found["optimizer steps in all"] == "3 x 12 = 36"
    assert found["actor, an optimizer step"] == (
        "4 sequences a rank (3 ranks), at most 2 micro-batches of 2 rows x 50 tokens (budget 120)"
    )
    assert found["pool all"] == "3 ranks x 1 CPUs: actor, rollout, reward"


def test_rows_longer_than_the_budget_are_said_to_run_alone(plugin):
    config = load(["algorithm=toy", "engine.tokens_per_micro_batch=10"], plugin)
    assert lines(config)["actor, an optimizer step"].endswith("run alone")


def test_rows_are_split_over_data_ranks_alone(plugin):
    """10 rows an update: 5 each for two data ranks; two of twelve would have none."""
    given = ["algorithm=toy", "trainer.prompts_per_step=10", "placement.pools.all.cpus_per_rank=0.5"]
    cut = ["placement.pools.all.ranks=4", "placement.roles.actor.tensor=2"]
    found = lines(load([*given, *cut], plugin))["actor, an optimizer step"]
    assert found.startswith("5 sequences a rank (2 of data among 4 ranks), at most")
    found = lines(load([*given, "placement.pools.all.ranks=12"], plugin))["actor, an optimizer step"]
    assert found.startswith("1 sequences a rank (12 ranks), 2 of them idle, at most")


def test_ppo_shows_critic_and_reference_where_they_run():
    found = lines(load(["algorithm=ppo", "placement=split"]))
    assert {"critic, an optimizer step", "reference, a forward pass"} <= set(found)
    demand, _, roles = found["pool value"].partition(": ")
    assert demand == "2 ranks x 0.3 CPUs" and set(roles.split(", ")) == {"critic", "reward"}


def test_supervised_rows_have_no_samples():
    found = lines(load(["algorithm=sft", "trainer.prompts_per_step=8", "data.max_row_tokens=64"]))
    assert found["rows a step"] == "8" and "samples a step" not in found
    assert found["tokens a step"] == "at most 8 x 64 = 512"


def decay(steps, *overrides):
    schedule = ["actor.engine.schedule.kind=linear", "actor.engine.schedule.total_steps=30"]
    given = ["algorithm.mini_batches=2", f"trainer.steps={steps}", *schedule, *overrides]
    return lines(load(given)).get("actor, learning rate")


def test_a_decay_is_shown_beside_the_optimizer_steps_of_the_run():
    """Two optimizer steps a step."""
    both = ["algorithm=ppo", "algorithm.epochs=1"]
    assert decay(15, *both) == "linear decay over 30 optimizer steps; the run takes 30"
    assert decay(20, *both, "actor.engine.schedule.min_ratio=0.1").endswith("takes 40: the last 10 run at 0.1 x lr")
    assert decay(10, *both).endswith("the run takes 20: the decay is not finished then")
    assert decay(15, *both, "algorithm.epochs=2").endswith("the run takes 60: the last 30 run at 0 x lr")
    assert decay(15, *both, "actor.engine.schedule.kind=constant") is None
    found = lines(load([*both, "critic.engine.schedule.kind=cosine", "critic.engine.schedule.total_steps=8"]))
    assert found["critic, learning rate"].startswith("cosine decay over 8 optimizer steps; the run takes 100")
    assert "actor, learning rate" not in found
