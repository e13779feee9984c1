"""What a person is told of preference algorithms before a model is loaded: losses, knobs, rows, vocabularies."""

import json
import os
import shutil
from pathlib import Path

import pytest

from hybridflow import launch
from hybridflow.config.check import report
from hybridflow.config.load import load
from hybridflow.config.locate import import_name
from hybridflow.data.tokenizers import byte_tokenizer, char_tokenizer
from hybridflow.errors import ConfigError
from hybridflow.tracking.run_folder import RunFolder
from workers.training.modeling import initialise

HERE = Path(__file__).parent
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
MODEL = {"model_type": "qwen2", "num_key_value_heads": 4, "max_position_embeddings": 512, **SIZES}


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)


def only(*overrides):
    with pytest.raises(ConfigError) as error:
        load(overrides)
    [line] = str(error.value).split("\n  ")[1:]
    return line


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["algorithm=dpo", "algorithm.loss=sigmiod"], "algorithm.loss: found 'sigmiod'; allowed: sigmoid, sigmoid_nor"),
        (["algorithm=dpo", "algorithm.loss=hinge", "algorithm.label_smoothing=0.1"],
         "algorithm.label_smoothing: found 0.1; loss 'hinge' reads beta: remove it"),
        (["algorithm=dpo", "algorithm.simpo_margin=1"], "algorithm.simpo_margin: found 1.0; loss 'sigmoid' reads beta"),
        (["algorithm=dpo", "algorithm.nll_reduction=mean"], "algorithm.nll_reduction: found 'mean'; loss 'sigmoid' re"),
        (["algorithm=dpo", "algorithm.loss=cpo", "algorithm.nll_reduction=mean"], None),
        (["algorithm=dpo", "algorithm.loss=exo_pair"], "algorithm.label_smoothing: found 0.0; exo_pair's target has n"),
        (["algorithm=dpo", "algorithm.loss=exo_pair", "algorithm.label_smoothing=0.001"], None),
        (["algorithm=dpo", "algorithm.label_smoothing=0.5"], "algorithm.label_smoothing: found 0.5; allowed: below 0."),
        (["algorithm=dpo", "algorithm.beta=0"], "algorithm.beta: found 0; allowed: above 0"),
        (["algorithm=dpo", "algorithm.aggregation=token_mean"], "algorithm.aggregation: found 'token_mean'; allowed:"),
        (["algorithm=simpo", "algorithm.loss=dpo"], "algorithm.loss: found 'dpo'; allowed: simpo"),
        (["algorithm=online_dpo", "algorithm.loss=simpo", "algorithm.reference=previous"],
         "algorithm.reference: found 'previous'; loss 'simpo' has no reference: remove it"),
        (["algorithm=online_dpo", "algorithm.samples_per_prompt=1"], "algorithm.samples_per_prompt: found 1; allowed:"),
        (["algorithm=kto", "trainer.prompts_per_step=1"], "trainer.prompts_per_step: found 1; kto compares the rows o"),
        (["algorithm=kto", "trainer.prompts_per_step=2"], None),
        (["algorithm=grpo", "data.chosen_field=good"], "data.chosen_field: found 'good'; only rows of kind 'pairs' ha"),
        (["algorithm=dpo", "data.chosen_field=good"], None),
        (["algorithm=process_reward_model", "algorithm.aggregation=prompt_mean"], "algorithm.aggregation: found promp"),
    ],
)  # fmt: skip
def test_one_mistake_one_line(overrides, line):
    if line is None:
        load(overrides)
    else:
        assert only(*overrides).startswith(line)


def test_an_unknown_loss_has_a_nearest_name():
    assert only("algorithm=dpo", "algorithm.loss=sigmiod").endswith("did you mean 'sigmoid'?")


def test_a_reference_only_where_the_loss_reads_one():
    def roles(*overrides):
        config = load(overrides)
        return import_name(config.algorithm.target).required_roles(config.algorithm.config)

    assert roles("algorithm=dpo") == ("actor", "reference")
    assert roles("algorithm=dpo", "algorithm.loss=orpo") == roles("algorithm=simpo") == ("actor",)
    assert roles("algorithm=online_dpo") == ("actor", "rollout", "reward", "reference")
    assert "reference" not in roles("algorithm=online_dpo", "algorithm.reference=previous")


def test_held_out_rows_are_asked_for_where_they_are_measured():
    Path("rows.jsonl").touch()
    given = ["data=jsonl", "data.train=rows.jsonl", "data.format=raw", "trainer.validate_every=2"]
    for algorithm in ("dpo", "sft", "reward_model"):
        assert only(*given, f"algorithm={algorithm}").startswith("data.validation: null, but trainer.validate_every")


def test_an_offline_algorithm_says_which_rows_it_learns_from():
    text = "from hybridflow.algorithm import Algorithm\n\nclass Mine(Algorithm):\n    online = False\n"
    text += "    def update(self, *_):\n        ...\n"
    Path("mine_without_rows.py").write_text(text)
    line = only("algorithm=sft", "~algorithm.aggregation", "~algorithm.epochs", "~algorithm.mini_batches",
                "algorithm.target=mine_without_rows.Mine")  # fmt: skip
    assert line.startswith("algorithm.target: found 'mine_without_rows.Mine', which is offline and does not say of whi")


def model(folder, tokenizer, **changes):
    initialise({**MODEL, **changes}, Path(folder), 0, tokenizer)
    return folder


def test_a_reference_with_another_vocabulary_is_refused_before_the_start():
    ours, same = model("ours", char_tokenizer()), model("same", char_tokenizer(), vocab_size=96)
    theirs, small = model("theirs", byte_tokenizer()), model("small", byte_tokenizer())
    config = json.loads(Path("small/config.json").read_text())
    Path("small/config.json").write_text(json.dumps(config | {"vocab_size": 50}))
    run = ["algorithm=dpo", "model=pretrained", f"model.path={ours}"]

    def reference(folder, kind="reference"):
        return f"+instances.{kind}={{type: {kind}, model: {folder}}}"

    assert load([*run, reference(same)]).instances["reference"].model == "same"
    found = only(*run, reference(theirs))
    assert found.startswith("instances.reference.model: found 'theirs', whose tokenizer differs from the run's in ")
    assert found.endswith("all models of a run read one tokenizer's ids")
    found = only(*run, reference(small))
    assert found.startswith(
        "instances.reference.model: found 'small' with a vocabulary of 50; the run's tokenizer has 82"
    )
    grpo = ["algorithm=grpo", *run[1:], "+instances.reward={type: reward_model, model: theirs}"]
    Path("theirs/value_head.safetensors").touch()
    assert only(*grpo).startswith("instances.reward.model: found 'theirs', whose tokenizer differs")
    for file in Path("theirs").glob("tokenizer*"):
        file.unlink()
    assert load([*run, reference(theirs)]).instances["reference"].model == "theirs"  # 258 rows: as far as one can see


def test_a_frozen_reward_model_must_have_been_one_before():
    """A new head is zeros, and would score every text 0; one under training begins with it."""
    model("judge", char_tokenizer())
    grpo = ["algorithm=grpo", "+instances.reward={type: reward_model, model: judge}"]
    assert only(*grpo) == (
        "instances.reward.model: found 'judge', which has no value_head.safetensors; allowed: the model/ folder of a "
        "run of algorithm=reward_model or process_reward_model"
    )
    assert load(["algorithm=reward_model", "model=pretrained", "model.path=judge"]).algorithm.name == "reward_model"
    Path("judge/value_head.safetensors").touch()
    assert load(grpo).instances["reward"].model == "judge"


def test_a_model_of_the_hub_is_compared_once_it_is_here(tmp_path, monkeypatch):
    model("ours", char_tokenizer())
    snapshot = model(tmp_path / "hub", byte_tokenizer())
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(snapshot))
    config = load(
        ["algorithm=dpo", "model=pretrained", "model.path=ours", "+instances.reference={type: reference, model: o/m}"]
    )
    with pytest.raises(ConfigError, match=r"instances\.reference\.model: found .*tokenizer differs from the run's"):
        launch.prepare_model(config, RunFolder(tmp_path / "run"), ("actor", "reference"))


def test_who_runs_a_reward_model():
    """One that is loaded is frozen, also under the name of the reward function's role; one that is trained is not."""
    shutil.copytree(model("first", char_tokenizer()), "judge")
    Path("judge/value_head.safetensors").touch()
    loaded = load(["+instances.reward={type: reward_model, model: judge}", "+instances.judge={type: reward_model}"])
    assert loaded.worker("reward") == loaded.worker("judge") == "workers.reward_model.RewardModelWorker"
    assert load([]).worker("reward") == "workers.reward.RewardWorker"
    for algorithm in ("reward_model", "process_reward_model"):
        config = load([f"algorithm={algorithm}", "instances.reward.engine.optimizer.lr=0.25"])
        assert config.worker("reward") == "workers.reward_model.RewardModelTrainer"
        assert config.instance("reward").engine.optimizer.lr == 0.25
        assert import_name(config.algorithm.target).product == "reward"
    assert only("algorithm=reward_model", "instances.reward.worker=nowhere.Mine").startswith(
        "instances.reward.worker: found 'nowhere.Mine'; there is no such module on the Python path"
    )


def lines(*overrides):
    text = report(load(overrides))
    return {key.strip(): value.strip() for key, _, value in (line.partition("  ") for line in text.splitlines())}


def test_the_arithmetic_of_a_step_of_pairs():
    found = lines("algorithm=dpo", "trainer.prompts_per_step=6", "algorithm.mini_batches=3", "data.max_row_tokens=64")
    assert found["rows a step"] == "6 pairs x 2 = 12"
    assert found["tokens a step"] == "at most 12 x 64 = 768"
    assert found["optimizer steps a step"] == "3, each of at most 4 sequences (1 epochs)"
    assert {"actor, an optimizer step", "reference, a forward pass"} <= set(found)
    assert "reward, an optimizer step" in lines("algorithm=reward_model")
    online = lines("algorithm=iterative_dpo", "trainer.prompts_per_step=8")
    assert online["samples a step"] == "8 prompts x 8 = 64"
    assert online["optimizer steps a step"] == "4, each of at most 4 sequences (1 epochs)"
    assert lines("algorithm=rejection_sampling")["optimizer steps a step"].startswith("1, each of at most 32 seq")
