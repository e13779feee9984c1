"""What a person types, against what they are told. Uses the shipped conf/ and a plug-in in a folder of their own."""

import os
import shutil
from pathlib import Path

import pytest
import yaml

from hybridflow.config import cross_checks
from hybridflow.config.load import load
from hybridflow.config.validate import validate
from hybridflow.errors import ConfigError

HERE = Path(__file__).parent
LOCAL = ["runtime=local", "engine=torch", "rollout=hf", "placement=single"]
HALF = ["engine.dtype=bfloat16", "engine.float32_head=true"]


@pytest.fixture(autouse=True)
def two_cores_and_own_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    shutil.copy(HERE / "toy_plugin.py", tmp_path)


def problems(*overrides, **options):
    with pytest.raises(ConfigError) as error:
        load(overrides, **options)
    head, *lines = str(error.value).split("\n  ")
    assert head == f"configuration: {len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return lines


def only(*overrides, **options):
    [line] = problems(*overrides, **options)
    return line


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "sft"])
@pytest.mark.parametrize("rest", [[], ["placement=split"], LOCAL], ids=["defaults", "split", "local"])
def test_shipped_combinations_are_valid(algorithm, rest):
    config = load([f"algorithm={algorithm}", *rest])
    assert config.algorithm.name == algorithm
    assert config.run_folder.parent == Path("runs") and config.run_folder.name.endswith(f"-{algorithm}")


def test_every_shipped_option_composes():
    conf = HERE.parents[1] / "conf"
    fill = {
        "model": ["model.path=some/model"],
        "data": ["data.train=name", "data.folder=."],
        "reward": ["reward.function=hybridflow.rewards.functions:gsm8k"],
        "algorithm": [],
    }
    for file in sorted(conf.glob("*/*.yaml")):
        group, option = file.parent.name, file.stem
        given = [] if "???" not in file.read_text() else fill[group]
        given = [text for text in given if f"{text.partition('=')[0].partition('.')[2]}: ???" in file.read_text()]
        try:
            load([f"{group}={option}", *given])
        except ConfigError as error:
            assert "unknown key" not in str(error) and "cannot compose" not in str(error), f"{file}: {error}"


def test_resolved_validates_to_the_same_configuration():
    config = load(["algorithm=ppo", "critic.engine.optimizer.lr=0.25", "run_folder=x"])
    plain = yaml.safe_load(yaml.safe_dump(config.resolved()))
    assert validate(plain) == config
    assert plain["critic"]["engine"]["optimizer"]["lr"] == 0.25


def test_a_role_changes_its_own_engine_alone():
    config = load(["engine.optimizer.lr=0.5", "critic.engine.optimizer.lr=0.25"])
    lrs = [getattr(config, role).engine.optimizer.lr for role in ("actor", "critic", "reference")]
    assert lrs == [0.5, 0.25, 0.5]
    assert load(["engine@critic.engine=torch"]).critic.engine.name == "torch"


def test_everything_is_reported_at_once():
    found = problems(
        "algorithm=grppo", "trainer.stepz=3", "trainer.steps=0", "+a.typo=3", "seed=abc", "resume=atuo", "lr=3",
        "rollout.sampling.temprature=1", "actor.engine.optimizer.lrr=1", "engine.optimizer.lr=-1",
        "model.config.hiden_size=3", "x=[1,", "reward.function=a:b", "algorithm.samples_per_prompt=1",
    )  # fmt: skip
    starts = [
        "algorithm: found 'grppo'; allowed: ",
        "x=[1,: cannot be read as an override",
        "trainer.stepz: unknown key; did you mean 'steps'? allowed: checkpoint_every,",
        "trainer.steps: found 0; allowed: above 0",
        "model.config.hiden_size: unknown key; did you mean 'hidden_size'?",
        "reward.function: found 'a:b'; there is no module 'a'",
        "algorithm.samples_per_prompt: 1 sample has no group baseline",
        "rollout.sampling.temprature: unknown key; did you mean 'temperature'?",
        "engine.optimizer.lr: found -1; allowed: at least 0.0",
        "actor.engine.optimizer.lrr: unknown key; did you mean 'lr'?",
        "a: unknown key; allowed: actor, algorithm",
        "lr: unknown key; did you mean 'engine.optimizer.lr'?",
        "seed: found 'abc'; allowed: an integer",
        "resume: found 'atuo'; allowed: auto, never; did you mean 'auto'?",
    ]
    for start in starts:
        assert any(line.startswith(start) for line in found), (start, found)
    assert len(found) == len(starts), found
    assert any(line.endswith("did you mean 'grpo'?") for line in found)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["algoritm=ppo"], "algoritm: unknown key; did you mean 'algorithm'?"),
        (["seed=1,2"], "seed: found the sweep '1,2'; add --multirun"),
        (["model=pretrained"], "model.path: must be set and is not"),
        (["model.path=m"], "model.path, config: found both; set exactly one"),
        (["model.config.model_type=qwen9"], "model.config.model_type: found 'qwen9'; allowed: a model type of transf"),
        (["model.config.vocab_size=50"], "model.config.vocab_size: found 50; tokenizer 'char' has 82 tokens"),
        (["model=pretrained", "model.path=./none"], "model.path: found './none'; no such folder with a config.json"),
        (["model.builder=nowhere.build"], "model.builder: found 'nowhere.build'; there is no module 'nowhere'"),
        (["rollout.sampling.top_p=0.9"], "rollout.sampling.top_p: found 0.9; allowed for training: 1 (greedy or trunc"),
        (["rollout.sampling.top_k=5"], "rollout.sampling.top_k: found 5; allowed for training: 0"),
        (["rollout.sampling.temperature=0"], "rollout.sampling.temperature: found 0.0; allowed for training: above 0"),
        (["rollout.validation.top_p=0.9", "rollout.validation.top_k=5", "rollout.validation.temperature=0"], None),
        (["algorithm=sft", "rollout.sampling.temperature=0"], None),
        (["model=pretrained", "model.path=Qwen/Qwen2.5-0.5B"], None),
        (["model=pretrained", "model.path=a/b/c"], "model.path: found 'a/b/c'; no such folder with a config.json"),
        (["+instances.judge={type: reward_model, model: org/judge-1.5B}"], None),
        (["+instances.judge={type: reward_model, model: ./none}"], "instances.judge.model: found './none'; no such f"),
        (["rollout=hf", "rollout.tensor_parallel_size=2"], "rollout.tensor_parallel_size: found 2; only engine=vllm"),
        (["rollout=hf", "rollout.kv_cache_gib=4"], "rollout.kv_cache_gib: found 4.0; only engine=vllm reads it"),
        (["rollout=hf", "rollout.vllm={seed: 1}"], "rollout.vllm: found {'seed': 1}; only engine=vllm reads it"),
        (["rollout=hf", "rollout.kv_cache_gib=1.0", "rollout.vllm={}"], None),
        (["+rollout.vllm.pipeline_parallel_size=2"], "rollout.vllm.pipeline_parallel_size: cannot be chosen, since an"),
        (["+rollout.vllm.tensor_parallel_size=2"], "rollout.vllm.tensor_parallel_size: rollout.tensor_parallel"),
        (["+rollout.vllm.seed=3"], None),
        (["+engine.deepspeed.gradient_clipping=2"], "engine.deepspeed.gradient_clipping: max_grad_norm says it"),
        (["+engine.deepspeed.zero_optimization.stage=3"], "engine.deepspeed.zero_optimization.stage: zero_stage says"),
        (["+engine.deepspeed.zero_optimization.reduce_bucket_size=9"], None),
        ([*HALF, "rollout.dtype=bfloat16"], "actor.engine.float32_head: found true; allowed: false, as rollout"),
        ([HALF[0], "rollout.dtype=float16", "rollout.float32_head=true"], "actor.engine.float32_head: found false;"),
        ([*HALF, "rollout.dtype=bfloat16", "rollout.float32_head=true"], None),
        (HALF, None),  # a rollout in float32 has its head in it anyway
        (["engine.float32_head=true"], None),
        (["engine=torch", "engine.zero_stage=3"], "engine.zero_stage: found 3; only name=deepspeed reads it: remove"),
        (["engine=torch", "engine.zero_stage=1"], None),
        (["engine=torch", "+engine.deepspeed={a: 1}"], "engine.deepspeed: found {'a': 1}; only name=deepspeed reads i"),
        (["engine=torch", "critic.engine.zero_stage=2"], "critic.engine.zero_stage: found 2; only name=deepspeed"),
        (["engine.zero_stage=3", "engine@critic.engine=torch"], None),
        (["engine@critic.engine=torch", "critic.engine.zero_stage=3"], "critic.engine.zero_stage: found 3; only name"),
        (["algorithm=sft", "algorithm.aggregation=prompt_mean"], "algorithm.aggregation: found prompt_mean; rows have"),
        (["ray.address=head:6379", "placement.pools.all.ranks=64"], None),
        (["ray.address=auto"], None),
        (["ray.address=head"], "ray.address: found 'head'; allowed: local, auto, or the host:port that `ray start"),
        (["ray.address=ray://head:1"], "ray.address: found 'ray://head:1'; allowed: local, auto"),
        (["ray.address=auto", "ray.num_cpus=4"], "ray.num_cpus: found 4; a cluster that is joined knows its own cor"),
        (["ray.num_cpus=8", "placement.pools.all.ranks=8"], None),
        (["ray.num_cpus=1"], "placement.pools: found a demand of all 2 CPUs; ray.num_cpus is 1"),
        ([*LOCAL, "ray.address=auto"], "ray.address: found 'auto'; runtime=local starts no Ray"),
        (["trainer.steps=many"], "trainer.steps: found 'many'; allowed: an integer"),
        (["trainer.export=7"], "trainer.export: found 7; allowed: true or false"),
        (["data.train=rows.jsonl", "data.arithmetic=null"], "data.train: found 'rows.jsonl'; there is no such file"),
        (["data.format=chat"], "data.format: found 'chat'; tokenizer 'char' has no chat template: data.format=raw"),
        (["data.arithmetic.digits=1"], "data.arithmetic.num_train + num_validation: found 9000; these operands make"),
        (["reward.function=./none.py:f"], "reward.function: found './none.py:f'; there is no file './none.py'"),
        (["reward.function=none"], "reward.function: found 'none'; "),
        (["~placement.roles.reward"], "placement.roles.reward: missing; grpo needs this role: give it a pool"),
        (["placement.roles.actor.pool=al"], "placement.roles.actor.pool: found 'al'; allowed: all; did you mean"),
        (["placement.roles.actor.ranks=3"], "placement.roles.actor.ranks: found 3; pool 'all' has 2 ranks: at most 2"),
        (["placement.pools.all.ranks=3"], "placement.pools: found a demand of all 3 CPUs; this machine has 2"),
        (["schedule.name=async"], "schedule.name: found 'async'; allowed: sync"),
        (["actor.optimizer=1"], "actor.optimizer: unknown key"),
        (["algorithm.target=toy_plugin.Tpy"], "algorithm.target: found 'toy_plugin.Tpy'; toy_plugin has no 'Tpy'; did"),
        (["algorithm.target=toy_plugin.NotAnAlgorithm"], "algorithm.target: found 'toy_plugin.NotAnAlgorithm', which"),
        (["algorithm.target=toy_plugin.Unfinished"], "algorithm.target: found 'toy_plugin.Unfinished', which has no u"),
        (["engine.settings=toy_plugin.Toy"], "engine.settings: found 'toy_plugin.Toy', which is no hybridflow"),
        (["rollout.sampling.max_response_tokens=500"], "rollout.sampling.max_response_tokens: found 500; with data"),
        (["rollout.max_model_len=40", "rollout.validation.max_response_tokens=4"], "rollout.sampling.max_"),
        (["~workers.reward"], "workers.reward: missing; grpo needs this role: name the worker class"),
        (["workers.actor=nowhere.at.All"], "workers.actor: found 'nowhere.at.All'; there is no such module"),
        (["model.builder=null"], "model.builder: found null with a model from a config"),
        (["~tracking"], None),
        (["trainer.steps=${nowhere}"], "cannot compose: "),
        (["~nothing.here"], "cannot compose: "),
    ],
)  # fmt: skip
def test_one_mistake_one_line(overrides, line):
    if line is None:
        assert load(overrides).tracking.console
    else:
        assert only(*overrides).startswith(line)


def test_local_needs_what_runs_in_one_process():
    keys = [line.partition(":")[0] for line in problems("runtime=local")]
    assert keys[:2] == ["actor.engine.name", "rollout.engine"]
    assert set(keys[2:]) == {f"placement.roles.{role}" for role in ("actor", "rollout", "reward")}


def test_packages_that_are_not_installed(monkeypatch):
    real = cross_checks.find_spec
    hidden = {"deepspeed", "vllm"}
    monkeypatch.setattr(cross_checks, "find_spec", lambda name: None if name in hidden else real(name))
    lines = problems()
    assert any(line.startswith("actor.engine.name: found 'deepspeed', which is not installed; pip i") for line in lines)
    assert any(line.startswith("rollout.engine: found 'vllm'") and "requirements/cpu.txt" in line for line in lines)
    assert load(["engine=torch", "rollout=hf"]).rollout.engine == "hf"
    assert [line.partition(":")[0] for line in problems("algorithm=sft")] == ["actor.engine.name"]


def test_validation_needs_held_out_rows():
    Path("rows.jsonl").touch()
    given = ["data=jsonl", "data.train=rows.jsonl", "data.format=raw", "data.max_prompt_tokens=64"]
    assert only(*given, "trainer.validate_every=2").startswith("data.validation: null, but trainer.validate_every")
    assert load(given).data.train == "rows.jsonl"


def test_a_mistake_in_a_file_is_found_like_one_on_the_command_line():
    Path("mine/experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /algorithm: ppo\ntrainer: {stepz: 3}\n"
    Path("mine/experiment/e.yaml").write_text(text)
    assert only("experiment=e", config_dir=Path("mine")).startswith("trainer.stepz: unknown key; did you mean 'steps'")


def test_a_persons_own_folder():
    """New options, replaced ones, an experiment over both, and the command line over all."""
    for group in ("algorithm", "placement", "experiment"):
        Path("mine", group).mkdir(parents=True)
    Path("mine/algorithm/toy.yaml").write_text("target: toy_plugin.Toy\nname: toy\nsamples: 3\n")
    single = (HERE.parents[1] / "conf/placement/single.yaml").read_text()
    Path("mine/placement/split.yaml").write_text(single.replace("cpus_per_rank: 1.0", "cpus_per_rank: 0.5"))
    Path("mine/experiment/e.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /algorithm: toy\n  - override /placement: split\n"
        "trainer: {steps: 7}\n"
    )
    config = load(["experiment=e", "algorithm.samples=5"], config_dir=Path("mine"))
    assert (config.algorithm.name, config.algorithm.config.samples, config.trainer.steps) == ("toy", 5, 7)
    assert config.placement.pools["all"].cpus_per_rank == 0.5
    assert "did you mean 'toy'" in only("algorithm=tyo", config_dir=Path("mine"))


def test_the_gsm8k_example():
    Path("train.jsonl").touch()
    Path("test.jsonl").touch()
    config = load(["experiment=gsm8k_grpo", "data.folder=."], config_dir=HERE.parents[1] / "examples/gsm8k/conf")
    assert config.data.origin("validation") == "./test.jsonl"
    assert config.reward.function.endswith(":gsm8k") and config.model.tokenizer == "byte"


def test_the_whole_recipe_of_scale_rl():
    Path("rows.jsonl").touch()
    named = ["model.path=org/model", "data.train=rows.jsonl", "reward.function=hybridflow.rewards.functions:gsm8k"]
    config = load(["experiment=scale_rl", *named])
    for engine in (config.actor.engine, config.rollout):
        assert engine.dtype == "bfloat16" and engine.float32_head
    sampling = config.rollout.sampling
    assert sampling.interruption.after_tokens + sampling.interruption.answer_tokens == sampling.max_response_tokens
    assert sampling.interruption == config.rollout.validation.interruption
    assert config.algorithm.name == "scale_rl" and config.algorithm.config.aggregation == "prompt_mean"
    samples = config.trainer.prompts_per_step * config.algorithm.config.samples_per_prompt
    assert (samples, sampling.max_response_tokens + config.data.max_prompt_tokens) == (768, 16_384)
    line = only("experiment=scale_rl", *named, "rollout.float32_head=false")
    assert line.startswith("actor.engine.float32_head: found true; allowed: false")


def test_a_primary_file_of_ones_own():
    Path("mine").mkdir()
    Path("mine/main.yaml").write_text("defaults:\n  - train\n  - _self_\ntrainer: {steps: 9}\n")
    assert load([], config_dir=Path("mine"), config_name="main").trainer.steps == 9
    with pytest.raises(ConfigError, match="--config-name: found 'mian'; allowed: main, train; did you mean 'main'"):
        load([], config_dir=Path("mine"), config_name="mian")
    with pytest.raises(ConfigError, match="--config-dir: found 'none'; there is no such folder"):
        load([], config_dir=Path("none"))


def test_engine_settings_of_a_plug_in():
    config = load(["engine.settings=toy_plugin.ToyEngine", *(f"~engine.{key}" for key in engine_keys())])
    assert config.actor.engine.lr == 1.0


def engine_keys():
    shipped = yaml.safe_load((HERE.parents[1] / "conf/engine/deepspeed.yaml").read_text())
    return [key for key in shipped if key != "settings"]
