"""Which ranks a role gets, as p, t and d or as replicas of t_g workers; and every combination that is refused."""

import itertools
import json
import os
import runpy
from pathlib import Path

import pytest
from refusals import problems

from hybridflow.config.load import load
from hybridflow.controller.coordinates import Shape

ROOT = Path(__file__).parents[2]
RESHARD = runpy.run_path(str(ROOT / "benchmarks/reshard_cases.py"))
SPAN = "placement.pools.all.ranks=4"
LORA = "+actor.engine.lora={rank: 2}"
pytestmark = pytest.mark.usefixtures("four_cores")


def test_the_shape_of_each_group() -> None:
    config = load(
        ["algorithm=ppo", SPAN, "placement.roles.actor.tensor=2", "rollout.tensor_parallel_size=2",
         "placement.roles.critic={pool: all, ranks: 2, tensor: 2}"]
    )  # fmt: skip
    assert config.shape("actor") == Shape(1, 2, 2)
    assert config.shape("critic") == Shape(1, 2, 1)
    assert config.shape("reference") == config.shape("reward") == Shape(1, 1, 4)
    assert config.shape("rollout") == Shape(1, 1, 2) and config.bundles_per_rank("rollout") == 2
    assert config.bundles_per_rank("actor") == 1


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([SPAN, "placement.roles.actor.ranks=3", "placement.roles.actor.tensor=2"],
         "placement.roles.actor.ranks: found 3 with pipeline=1 and tensor=2; ranks are pipeline x tensor x data, a "
         "multiple of 2: 2, 4"),
        (["placement.roles.actor.tensor=4"],
         "placement.roles.actor.ranks: found 2 with pipeline=1 and tensor=4; ranks are pipeline x tensor x data, a "
         "multiple of 4: none in pool 'all' of 2 ranks: raise placement.pools.all.ranks"),
        (["placement.roles.actor.pipeline=2"],
         "placement.roles.actor.pipeline: found 2; layouts, plans and transfers know pipeline stages, but no engine "
         "trains with them yet: allowed 1"),
        (["placement.roles.actor.tensor=2", "model.config.num_key_value_heads=1"],
         "placement.roles.actor.tensor: found 2; it must divide the model's 1 key-value heads: 1"),
        (["placement.roles.actor.tensor=2", "model.config.intermediate_size=705"],
         "placement.roles.actor.tensor: found 2; it must divide the model's 705 columns of the feed-forward: 1"),
        (["placement.roles.actor.tensor=2", "engine=torch"],
         "placement.roles.actor.tensor: found 2; actor.engine.name is torch, which holds whole models: allowed 1, or "
         "name=deepspeed"),
        (["placement.roles.actor.tensor=2", LORA],
         "placement.roles.actor.tensor: found 2 with actor.engine.lora; an adapter beside cut weights is not supported "
         "yet: allowed 1, or lora=null"),
        ([LORA, "model.config.model_type=mixtral"],
         "actor.engine.lora: found one, and a model of 8 experts, which vLLM on a CPU cannot run beside an adapter: "
         "allowed null, or rollout=hf"),
        (["+actor.engine.lora={rank: 513}"],
         "actor.engine.lora.rank: found 513; the LoRA layers of rollout.engine=vllm have ranks up to 512: allowed 1 to "
         "512, or rollout=hf"),
        (["placement.roles.actor.tensor=2", "actor.engine.compile=true"],
         "placement.roles.actor.tensor: found 2 with actor.engine.compile; cut layers are not compiled: allowed 1, or "
         "compile=false"),
        (["placement.roles.actor.tensor=2", "model.config.model_type=olmo2"],
         "placement.roles.actor.tensor: found 2; training cuts models of type llama, mistral, qwen2, qwen3, this one "
         "is olmo2: allowed 1"),
        (["placement.roles.actor.tensor=2", "model.config.model_type=mixtral"],
         "placement.roles.actor.tensor: found 2; the model has 8 experts, which training does not cut yet: allowed 1"),
        (["placement.roles.reward.tensor=2"],
         "placement.roles.reward.tensor: found 2; the role is a function and holds no model: allowed 1"),
        (["placement.roles.rollout.tensor=2"],
         "placement.roles.rollout.tensor: found 2; a rollout rank is a replica: set rollout.tensor_parallel_size"),
        (["placement.roles.rollout.pipeline=2"],
         "placement.roles.rollout.pipeline: found 2; no rollout engine has pipeline stages: allowed 1"),
        (["rollout.tensor_parallel_size=4"],
         "rollout.tensor_parallel_size: found 4; an engine takes one rank of pool 'all' for each worker, and that pool "
         "has 2: at most 2, or raise placement.pools.all.ranks"),
        (["rollout.tensor_parallel_size=2", "placement.roles.rollout.ranks=2"],
         "placement.roles.rollout.ranks: found 2 replicas of rollout.tensor_parallel_size=2; each takes one rank of "
         "pool 'all' for each worker, and that pool has 2: at most 1"),
        ([SPAN, "rollout.tensor_parallel_size=3"],
         "rollout.tensor_parallel_size: found 3; it must divide the model's 4 attention heads, 704 columns of the "
         "feed-forward, 4 key-value heads (or be a multiple), vocabulary of 82, padded to 128 rows: 1, 2, 4"),
        ([SPAN, "rollout.tensor_parallel_size=4", "model.config.num_key_value_heads=2"], None),
        ([SPAN, "placement.roles.actor.tensor=4"], None),
        (["rollout=hf", "rollout.tensor_parallel_size=2"],
         "rollout.tensor_parallel_size: found 2; only engine=vllm reads it: remove it, or set engine=vllm"),
        (["placement.roles.actor.tensor=0"], "placement.roles.actor.tensor: found 0; allowed: at least 1"),
        (["placement.roles.actor.data=2"], "placement.roles.actor.data: unknown key; allowed: pipeline, pool..."),
    ],
)  # fmt: skip
def test_one_mistake_one_line(overrides: list[str], line: str | None) -> None:
    if line is None:
        load(overrides)
        return
    [found] = problems(*overrides)
    assert found == line or (line.endswith("...") and found.startswith(line[:-3]))


def test_all_mistakes_at_once() -> None:
    found = problems(
        "algorithm=ppo", "placement.pools.all.ranks=3", "placement.roles.actor.pipeline=3",
        "placement.roles.critic.tensor=2", "placement.roles.rollout.tensor=2", "rollout.tensor_parallel_size=4",
        "critic.engine.name=torch", "placement.roles.reward.pipeline=2",
    )  # fmt: skip
    assert sorted(line.partition(":")[0] for line in found) == [
        "placement.roles.actor.pipeline",
        "placement.roles.actor.pipeline",
        "placement.roles.critic.ranks",
        "placement.roles.critic.tensor",
        "placement.roles.reward.pipeline",
        "placement.roles.rollout.tensor",
        "rollout.tensor_parallel_size",
    ], found
    assert "placement.roles.actor.pipeline: found 3; it must divide the model's 4 layers: 1, 2, 4" in found


def test_a_model_of_a_roles_own_is_cut_by_its_own_sizes(tmp_path: Path) -> None:
    (tmp_path / "judge").mkdir()
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 82}
    (tmp_path / "judge/config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    judge = "+instances.cost={type: reward_model, model: judge}"
    found = problems("+placement.roles.cost={pool: all, tensor: 2}", "algorithm=safe_rlhf", judge)
    assert "placement.roles.cost.tensor: found 2; it must divide the model's 1 key-value heads: 1" in found


@pytest.mark.parametrize("name", RESHARD["CASES"])
def test_the_six_cases_are_accepted_on_two_cores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    case = RESHARD["CASES"][name]
    config = load([*RESHARD["COMMON"], *case.overrides])
    shape = config.shape("actor")
    assert f"{shape.pipeline}-{shape.tensor}-{shape.data}" == case.training
    assert (config.bundles_per_rank("rollout"), config.ranks("rollout")) == (case.generation_tensor, case.replicas)
    pools = [config.place(role).pool for role in ("actor", "rollout")]
    assert len(set(pools)) == (1 if case.placement == "colocated" else 2)


def test_the_six_cases_are_those_of_the_page() -> None:
    page = (ROOT / "docs/resharding.md").read_text()
    for name, c in RESHARD["CASES"].items():
        cells = (name, c.training, c.generation_tensor, c.replicas, c.placement, c.zero_stage)
        assert f"| {' | '.join(map(str, cells))} |\n" in page


def test_the_six_cases_cover_all_pairs() -> None:
    rows = [(c.training, c.generation_tensor, c.replicas, c.placement) for c in RESHARD["CASES"].values()]
    assert len(rows) == 6
    for one, other in itertools.combinations(range(4), 2):
        seen = {(row[one], row[other]) for row in rows}
        assert seen == set(itertools.product({row[one] for row in rows}, {row[other] for row in rows}))
