"""Whole runs that train adapters, in one process: the reference is the actor with its adapter off."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hybridflow import cli
from hybridflow.batch import Batch, Ragged
from hybridflow.batch_ref import BatchRef
from hybridflow.config.load import load
from hybridflow.launch import Session, opened

SMALL = [
    "runtime=local", "engine=torch", "rollout=hf", "placement=single", "tracking.console=false", "model=tiny",
    "model.config.hidden_size=32", "model.config.intermediate_size=64", "model.config.num_hidden_layers=1",
    "data.max_prompt_tokens=32", "rollout.sampling.max_response_tokens=6", "trainer.prompts_per_step=4",
]  # fmt: skip
LORA = ["actor.engine.lora.rank=4", "actor.engine.optimizer.lr=1e-2"]
KL = ["algorithm=grpo", "algorithm.kl_loss_coef=0.1", "algorithm.old_logprobs=recompute"]


@pytest.fixture
def reward(tmp_path: Path) -> str:
    """Different responses get different scores, so that a random model has something to learn."""
    (tmp_path / "mine.py").write_text(
        "def score(prompt, response, answer, **row):\n    return len(set(response)) / 6\n"
    )
    return f"reward.function={tmp_path / 'mine.py'}:score"


@pytest.fixture
def train(reward: str) -> Callable[..., list[dict[str, float]]]:
    def run(folder: Path, *overrides: str) -> list[dict[str, float]]:
        assert cli.main(["train", *SMALL, reward, f"run_folder={folder}", *overrides]) == 0
        return [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return run


def test_grpo_with_a_kl_loss_has_no_second_model_and_resumes_exactly(train: Callable, tmp_path: Path) -> None:
    common = [*KL, *LORA, "trainer.checkpoint_every=1"]
    steps = train(tmp_path / "whole", *common, "trainer.steps=2")
    assert len(steps) == 2
    assert abs(steps[0]["actor/kl_loss"]) < 1e-6 < 1e-5 < steps[1]["actor/kl_loss"]
    assert max(step["rollout/logratio_max"] for step in steps) < 1e-4  # the engine has the adapter of its step
    assert [step["sync/version"] for step in steps] == [1, 2]
    saved = torch.load(tmp_path / "whole/checkpoints/step-000002/actor/engine.pt")["weights"]
    assert saved and all(".lora_" in name for name in saved)
    assert {step["sync/bytes"] for step in steps} == {sum(tensor.nbytes for tensor in saved.values())}
    assert sorted(path.name for path in (tmp_path / "whole/checkpoints/step-000002").iterdir() if path.is_dir()) == [
        "actor"
    ]

    train(tmp_path / "parts", *common, "trainer.steps=1")
    train(tmp_path / "parts", *common, "trainer.steps=2")
    samples = [(tmp_path / part / "samples/step-000002.jsonl").read_text() for part in ("whole", "parts")]
    assert samples[0] == samples[1]
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / part / "model").state_dict() for part in ("whole", "parts")
    ]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "whole/initial_model")
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "whole/model/adapter")).merge_and_unload().state_dict()
    assert max(float((adapted[name] - models[0][name]).abs().max()) for name in models[0]) < 1e-6


def test_ppo_with_adapters_on_actor_and_critic_begins_with_no_kl_at_all(train: Callable, tmp_path: Path) -> None:
    """Old and reference log-probs are two passes over the same micro-batches: the reward pays for exactly nothing."""
    steps = train(
        tmp_path / "run", "algorithm=ppo", "algorithm.kl_reward_coef=0.05", "algorithm.old_logprobs=recompute",
        "algorithm.epochs=1", "engine.lora.rank=4", "engine.optimizer.lr=1e-2", "trainer.steps=2",
        "trainer.checkpoint_every=2",
    )  # fmt: skip
    assert steps[0]["kl/reward_kl"] == 0.0 != steps[1]["kl/reward_kl"]
    saved = torch.load(tmp_path / "run/checkpoints/step-000002/critic/engine.pt")["weights"]
    assert {name.partition(".")[0] for name in saved} == {"hf", "value_head"}
    assert all(".lora_" in name for name in saved if name.startswith("hf."))


def logprobs(session: Session, role: Any, tokens: Batch) -> torch.Tensor:
    rows = BatchRef.put(tokens, session.groups["actor"].ranks.worker.context.store)
    made = role.logprobs(rows, temperature=1.0, column="found").result()
    return made.fetch(session.groups["actor"].ranks.worker.context.store).ragged("found").flat


def test_the_reference_role_stays_the_base_model(reward: str, tmp_path: Path) -> None:
    tokens = Batch({"tokens": Ragged.from_rows([[1, 5, 9, 13, 4], [7, 7, 2]], dtype=torch.int64)})
    config = load([*SMALL, *KL, *LORA, reward, f"run_folder={tmp_path / 'run'}"])
    with opened(config) as session:
        roles = session.schedule.roles  # type: ignore[attr-defined]
        assert set(session.groups) == {"actor", "rollout", "reward"} and "reference" in roles
        before = logprobs(session, roles.reference, tokens)
        assert torch.equal(before, logprobs(session, roles.actor, tokens))
        session.schedule.step(0)
        assert torch.equal(before, logprobs(session, roles.reference, tokens))
        assert float((before - logprobs(session, roles.actor, tokens)).abs().max()) > 1e-4


def test_an_explicit_reference_with_a_model_of_its_own_overrides(train: Callable, tmp_path: Path) -> None:
    train(tmp_path / "first", "algorithm=grpo", "trainer.steps=1")
    explicit = f"+instances.reference={{type: reference, model: {tmp_path / 'first/model'}}}"
    steps = train(tmp_path / "run", *KL, *LORA, explicit, "seed=3", "trainer.steps=1")
    assert steps[0]["actor/kl_loss"] > 1e-4  # of another random model
    worker = "+instances.reference={type: reference, worker: workers.reference.ReferenceWorker}"
    for more, own in ((explicit, ("reference",)), (worker, ("reference",)), ("seed=0", ())):
        assert load([*KL, *LORA, more]).with_ranks(("actor", "reference")) == ("actor", *own)


def test_check_says_who_needs_no_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", *SMALL, *KL, *LORA]) == 0
    assert re.search("^reference  +the actor's weights, its adapter off", capsys.readouterr().out, re.MULTILINE)
    assert cli.main(["check", *SMALL, *KL]) == 0
    assert "reference, a forward pass" in capsys.readouterr().out
    assert cli.main(["check", *SMALL, *KL, "actor.engine.lora.rank=0"]) == 2
    assert "actor.engine.lora.rank" in capsys.readouterr().err
