"""Bytes from numbers alone, against ones worked out by hand and against what real DeepSpeed ranks hold."""

import json
import os
from pathlib import Path
from typing import Any, get_args

import memory_ranks
import pytest

from hybridflow.config.layout_table import layout_table, reshard, size_text
from hybridflow.config.load import load
from hybridflow.config.memory import held
from hybridflow.config.placement_checks import VLLM_LORA_RANKS
from hybridflow.config.run_config import RunConfig
from tests.rank_processes import run_ranks
from workers.training.modeling import initialise

HERE = Path(__file__).parent
SHARDED = "+engine.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"

# Elements: embedding and head 96 x 8 each; q 64, k and v 32 a key-value head, o 64, gate, up, down 96 each, 3 norms of
# 8: 2040 with one key-value head, 2104 with two.
MODEL = [
    "model.config.model_type=llama", "model.config.hidden_size=8", "model.config.intermediate_size=12",
    "model.config.num_hidden_layers=1", "model.config.num_attention_heads=2", "model.config.num_key_value_heads=1",
    "model.config.vocab_size=96", "model.config.tie_word_embeddings=false",
]  # fmt: skip
TWO_KV = "model.config.num_key_value_heads=2"
TRAINING, GENERATION = "placement.roles.actor.tensor=2", "rollout.tensor_parallel_size=2"


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def small(*overrides: str) -> RunConfig:
    return load([*MODEL, *overrides])


@pytest.mark.parametrize(
    ("overrides", "weights", "gradients", "optimizer"),
    [
        (["engine=torch"], 4 * 2040, 4 * 2040, 2 * 4 * 2040),
        (["engine=torch", "engine.optimizer.name=sgd"], 4 * 2040, 4 * 2040, 0),
        (["engine=torch", "engine.dtype=bfloat16"], 2 * 2040, 4 * 2040, 3 * 4 * 2040),
        (["engine.zero_stage=0"], 4 * 2040, 4 * 2040, 2 * 4 * 2040),
        (["engine.zero_stage=1"], 4 * 2040, 4 * 2040, 3 * 4 * 1020),
        (["engine.zero_stage=2"], 4 * 2040, 4 * 1020, 3 * 4 * 1020),
        (["engine.zero_stage=2", "engine.dtype=bfloat16"], 2 * 2040, 4 * 1020, 3 * 4 * 1020),
        (["engine.zero_stage=3", SHARDED], 4 * 1020, 4 * 1020, 3 * 4 * 1020),
        (["engine.zero_stage=3"], 4 * (1020 + 2040), 4 * 1020, 3 * 4 * 1020),  # all below DeepSpeed's threshold
        # Half of the 544 elements of layer matrices, and embedding, head and norms whole: 272 + 1560.
        ([TWO_KV, TRAINING, "engine.zero_stage=1"], 4 * 1832, 4 * 1832, 3 * 4 * 1832),
        # A of 2 x in and B of out x 2 at q, k, v, o, gate, up and down: 2 (16 + 12 + 12 + 16 + 20 + 20 + 20) = 232.
        (["+engine.lora={rank: 2}", "engine=torch"], 4 * (2040 + 232), 4 * 232, 2 * 4 * 232),
    ],
)  # fmt: skip
def test_a_training_rank_by_hand(overrides: list[str], weights: int, gradients: int, optimizer: int) -> None:
    found = held(small(*overrides), "actor", "actor")
    assert found is not None
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)


def test_frozen_roles_and_critics_by_hand() -> None:
    config = small("algorithm=ppo", "engine.zero_stage=1")
    reference, critic = held(config, "reference", "actor"), held(config, "critic", "actor")
    assert reference is not None and reference.phases == dict.fromkeys(reference.phases, 4 * 2040)
    # No head of 768, but one value a token: 8 weights and a bias; padded to a multiple of 2 x 2 elements for ZeRO.
    assert critic is not None and critic.weights == 4 * 1284 and critic.optimizer == 3 * 4 * 642
    assert held(config, "reward", "actor") is None


def test_an_engine_worker_by_hand() -> None:
    """128 padded rows of embedding and head, halved; the one key-value head twice; matrices halved; norms whole."""
    found = held(small(GENERATION, "rollout.kv_cache_gib=0.5"), "rollout", "actor")
    assert found is not None and found.weights == 4 * (2 * 64 * 8 + 4 * 32 + 3 * 48 + 24)
    assert found.cache == 2**29 and found.phases["training"] == found.phases["generation"] == found.weights + 2**29
    assert found.in_flight == 2 * 4 * (64 * 8 + 8)  # twice the largest layer: half of the padded head, and its norm
    assert found.phases["transition"] == found.weights + 2**29 + found.in_flight


ADAPTER = "+actor.engine.lora={rank: 2}"


def test_an_engine_worker_beside_an_adapter_by_hand() -> None:
    """Hugging Face's holds A and B as they are: 232 as above. vLLM's layers hold rank 8: 8 (16 + 12 + 12 + 16 + 20 + 20
    + 20) = 928; of two workers each has A whole (5 x 8 x 8 elements), but of o and down half (8 x 4 and 8 x 6), and of
    B, whose rows are cut, half (8 x (4 + 4 + 4 + 6 + 6) with two key-value heads), but whole of o and down (2 x 8 x 8).
    """
    plain, beside = (
        held(small("rollout=hf"), "rollout", "actor"),
        held(small("rollout=hf", ADAPTER), "rollout", "actor"),
    )
    assert plain is not None and beside is not None and beside.weights - plain.weights == 4 * 232
    plain, beside = held(small(), "rollout", "actor"), held(small(ADAPTER), "rollout", "actor")
    assert plain is not None and beside is not None and beside.weights - plain.weights == 4 * 928
    cut = [TWO_KV, GENERATION]
    plain, beside = held(small(*cut), "rollout", "actor"), held(small(*cut, ADAPTER), "rollout", "actor")
    assert plain is not None and beside is not None
    assert beside.weights - plain.weights == 4 * (5 * 64 + 32 + 48 + 8 * 24 + 2 * 64)
    # vLLM's q, k and v are one layer: an adapter of q alone has memory for all three.
    few = held(small("+actor.engine.lora={rank: 2, target_modules: [q_proj]}"), "rollout", "actor")
    alone = held(small(), "rollout", "actor")
    assert few is not None and alone is not None and few.weights - alone.weights == 4 * 8 * (16 + 12 + 12)


def test_an_adapter_travels_alone_once_the_rest_is_there() -> None:
    config = small("placement=single", ADAPTER)
    moves = reshard(config)
    assert moves is not None and moves.later is not None
    assert (moves.total, moves.later.total) == (4 * (2040 + 232), 4 * 232)
    text = layout_table(config, ("actor", "rollout"), "actor").splitlines()
    assert "resharding actor -> rollout moves once 9.09 kB: each of 1 ranks sends 9.09 kB, each of 1 workers receives "\
        "9.09 kB;" in text  # fmt: skip
    assert "then, at each sync, its adapter alone, 928 B: each of 1 ranks sends 928 B, each of 1 workers receives "\
        "928 B;" in text  # fmt: skip
    assert (found := reshard(small())) is not None and found.later is None


def test_vllm_s_ranks_are_those_that_it_has() -> None:
    lora = pytest.importorskip("vllm.config.lora", reason="vLLM is an optional extra")
    assert get_args(lora.MaxLoRARanks) == VLLM_LORA_RANKS


def test_an_engine_on_a_gpu_sleeps_while_others_train() -> None:
    given = ["placement.pools.all.gpus_per_rank=1", "rollout.kv_cache_gib=0.5"]
    found = held(small(*given), "rollout", "actor")
    assert found is not None and found.sleeps
    assert found.phases == {
        "training": 0,
        "transition": found.weights + found.in_flight,
        "generation": found.weights + 2**29,
    }


def test_an_hf_engine_on_a_cpu_keeps_the_weights_that_are_sent_once() -> None:
    given = ["rollout=hf", "engine=torch", "schedule.sleep=always"]
    for adapter, sleeps in (([], True), (["+actor.engine.lora={rank: 4}"], False)):
        found = held(small(*given, *adapter), "rollout", "actor")
        assert found is not None and found.sleeps == sleeps
        assert found.phases["training"] == (0 if sleeps else found.weights)


def test_gradients_are_gone_after_the_step_where_the_engine_frees_them() -> None:
    for engine, kept in ((["engine=torch"], True), (["engine.zero_stage=2"], False), (["engine.zero_stage=3"], True)):
        found = held(small(*engine), "actor", "actor")
        assert found is not None
        assert found.phases["training"] - found.phases["generation"] == (0 if kept else found.gradients)


def test_the_bytes_of_a_resharding_by_hand() -> None:
    """1-2-1 -> t_g 2. Each worker: 272 elements of matrices and 24 of norms; of 96 rows the first holds 64."""
    moves = reshard(small(TWO_KV, TRAINING, GENERATION))
    assert moves is not None
    assert moves.received == {0: 4 * (272 + 24 + 2 * 64 * 8), 1: 4 * (272 + 24 + 2 * 32 * 8)}
    assert moves.total == sum(moves.sent.values()) == 4 * 2128
    # Each actor rank lacks 272 of 2104 elements; each worker is handed all.
    assert moves.gather == 4 * (2 * 272 + 2 * 2104)


def test_full_replicas_share_the_sending() -> None:
    """1-1-2 -> t_g 1 x 2: nothing to gather up to ZeRO 2, halves under ZeRO 3."""
    moves = reshard(small("engine.zero_stage=1"))
    assert moves is not None and moves.total == moves.gather == 4 * 2 * 2040
    assert sum(moves.sent.values()) == moves.total and max(moves.sent.values()) < 0.7 * moves.total
    sharded = reshard(small("engine.zero_stage=3"))
    assert sharded is not None and sharded.total == 4 * 2 * 2040 and sharded.gather == 4 * (2040 + 2 * 2040)


def test_the_table() -> None:
    lines = layout_table(small(), ("actor", "rollout", "reward"), "actor").splitlines()
    assert lines[0].split("  ")[0] == "bytes a rank"
    assert lines[1].split()[:4] == ["actor", "1-1-2", "8.16", "kB"]
    assert lines[2].startswith("rollout") and "t_g 1 x 2" in lines[2] and "1.07 GB" in lines[2]
    assert lines[3].startswith("pool all, sum")
    assert not any("asleep" in line for line in lines)
    gpus = layout_table(small("placement.pools.all.gpus_per_rank=1"), ("rollout",), "actor")
    assert gpus.splitlines()[-1].startswith("Engines are counted as asleep in training")
    assert any(line.startswith("resharding actor -> rollout moves 16.3 kB") for line in lines)


def test_models_that_are_not_known_are_said() -> None:
    given = ["model=pretrained", "model.path=Qwen/Qwen2.5-0.5B"]
    assert "actor: bytes not known: its config is fetched at start" in layout_table(
        load(given), ("actor", "rollout"), "actor"
    )
    text = layout_table(load(["model.config.model_type=gemma2"]), ("actor",), "actor")
    assert text == "actor: bytes not known: the table knows model types llama, mistral, mixtral, qwen2, not gemma2"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (12_345, "12.3 kB"), (999_600, "1 MB"), (2**30, "1.07 GB")],
)
def test_sizes(count: int, text: str) -> None:
    assert size_text(count) == text


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, int]]]:
    """[rank][case] of what DeepSpeed holds of the model."""
    folder = tmp_path_factory.mktemp("ranks")
    config: dict[str, Any] = dict(load(MODEL).model.config or {})
    initialise(config, folder / "model", seed=0)
    run_ranks(HERE / "memory_ranks.py", 2, folder)
    return [json.loads((folder / f"bytes-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", memory_ranks.CASES)
def test_the_table_is_what_deepspeed_holds(case: str, real: list[dict[str, dict[str, int]]]) -> None:
    fields = dict(memory_ranks.CASES[case])
    given = [SHARDED] if fields.pop("deepspeed", None) else []
    given += [ADAPTER] if fields.pop("lora", None) else []
    found = held(small(*given, *(f"engine.{name}={value}" for name, value in fields.items())), "actor", "actor")
    assert found is not None
    for rank in real:
        assert rank[case] == {"weights": found.weights, "optimizer": found.optimizer}
