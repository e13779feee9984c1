"""The actor's adapter in real engines: frozen weights come once, then A and B alone. vLLM with one and two tensor
ranks, and Hugging Face's."""

import pickle
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybridflow.errors import ConfigError, WeightSyncError
from hybridflow.resharding.proofs import verify
from hybridflow.resharding.transport import RankLayout, ThroughStore
from hybridflow.schedule.policy_sync import plan_route
from tests.workers.generation.adapter_trainer import PROBE, AdapterTrainer
from tests.workers.generation.test_rollout import Memory
from tests.workers.generation.test_vllm_engine import LONG, in_thread, rest
from tests.workers.generation.trainer import deliver
from workers.generation.adapter import ServedAdapter
from workers.generation.base import Request, Sampling
from workers.generation.settings import RolloutSettings
from workers.training.settings import LoraSettings

LORA = LoraSettings(rank=3, alpha=32)  # a scale that is no power of two, and a rank that vLLM rounds up
WANTED = [Request(0, 0, [7, 8, 9], 1), Request(1, 1, [40], 2)]
ENGINES = ("hf", "vllm", "vllm2")


@pytest.fixture(scope="module")
def adapter_hf(tied: Any) -> Any:
    from workers.generation.hf_engine import HfEngine

    return HfEngine(tied.folder, RolloutSettings(engine="hf", max_num_seqs=8), lora=LORA)


def _vllm(folder: Any, tensor: int) -> Iterator[Any]:
    pytest.importorskip("vllm", reason="vLLM is an optional extra")
    from workers.generation.vllm_engine import VllmEngine

    settings = RolloutSettings(kv_cache_gib=0.1, max_num_seqs=32, tensor_parallel_size=tensor)
    engine = VllmEngine(folder, settings, lora=LORA)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def adapter_vllm(tied: Any) -> Iterator[Any]:
    yield from _vllm(tied.folder, 1)


@pytest.fixture(scope="module")
def adapter_vllm2(untied: Any) -> Iterator[Any]:
    yield from _vllm(untied.folder, 2)


@pytest.fixture
def case(request: pytest.FixtureRequest, tied: Any, untied: Any) -> Any:
    """An engine that holds the base and an adapter that changes nothing, and a trainer that begins there."""
    engine = request.getfixturevalue(f"adapter_{request.param}")
    trainer = AdapterTrainer((untied if request.param == "vllm2" else tied).folder, LORA, engine)
    trainer.prove(trainer.route, trainer.send(trainer.route, 0))
    return SimpleNamespace(
        name=request.param, engine=engine, trainer=trainer, workers=2 if request.param == "vllm2" else 1
    )


everywhere = pytest.mark.parametrize("case", ENGINES, indirect=True)
in_vllm = pytest.mark.parametrize("case", ["vllm"], indirect=True)


@everywhere
def test_twenty_updates_of_the_adapter_arrive_exactly_and_alone(case: Any) -> None:
    """Bytes: of A whole on every worker but for o and down, of B cut over them but for these."""
    trainer = case.trainer
    first = trainer.logprobs(PROBE)
    adapter = sum(tensor.nbytes for tensor in trainer.trained.scorer.adapter.tensors().values())
    for version in range(1, 21):
        trainer.update(seed=version)
        receipt = trainer.send(trainer.later, version)
        trainer.prove(trainer.later, receipt)
        assert trainer.read_back() == ()
    cut = {
        "q_proj": "B",
        "k_proj": "B",
        "v_proj": "B",
        "gate_proj": "B",
        "up_proj": "B",
        "o_proj": "A",
        "down_proj": "A",
    }
    moved = sum(
        tensor.nbytes * (1 if f"lora_{cut[name.split('.')[-3]]}" in name else case.workers)
        for name, tensor in trainer.trained.scorer.adapter.tensors().items()
    )
    assert receipt.num_bytes == trainer.later.plan.total_bytes == moved <= case.workers * adapter
    assert moved * 10 < trainer.route.plan.total_bytes
    assert max(abs(a - b) for a, b in zip(first, trainer.logprobs(PROBE), strict=True)) > 1
    for (sample,) in case.engine.generate(WANTED, Sampling(max_response_tokens=12)):
        prompt = WANTED[sample.index].prompt
        exact = trainer.logprobs([*prompt, *sample.tokens])[len(prompt) - 1 :]
        assert sample.logprobs == pytest.approx(exact, abs=1e-4)
        assert set(sample.versions) == {20}


@everywhere
def test_an_engine_that_may_lack_the_base_is_not_given_the_adapter_alone(case: Any) -> None:
    trainer = case.trainer
    trainer.update(seed=1)
    name = "model.layers.1.self_attn.k_proj.lora_A.weight"
    last = trainer.later.incoming[0][-1]
    left = tuple(filling for filling in last.fillings if filling.storage.name != name)
    with pytest.raises(WeightSyncError, match=f"{name}: needs"):
        trainer.send(trainer.later, 1, incoming=[*trainer.later.incoming[0][:-1], replace(last, fillings=left)])
    with pytest.raises(WeightSyncError, match="half-way"):
        next(case.engine.generate(WANTED, Sampling(max_response_tokens=2)))
    with pytest.raises(WeightSyncError, match=r"only 28 of \d+ parameters come.* Send all"):
        trainer.send(trainer.later, 2)
    trainer.prove(trainer.route, trainer.send(trainer.route, 3))
    trainer.update(seed=2)
    trainer.prove(trainer.later, trainer.send(trainer.later, 4))
    assert trainer.read_back() == ()


@pytest.mark.parametrize("case", ["hf", "vllm2"], indirect=True)
def test_the_adapter_comes_through_the_store_in_buckets_too(case: Any) -> None:
    """The whole of it again, then A and B alone, in several parts each."""
    trainer, through = case.trainer, ThroughStore(40_000)
    for version, route in enumerate((trainer.route, trainer.later, trainer.later), start=1):
        trainer.update(seed=version)
        stored = replace(route, transport=through)
        trainer.prove(route, trainer.send_in_turn(stored, version, Memory()))
    assert trainer.read_back() == ()


@pytest.mark.parametrize("names", [("hf_engine", "tied"), ("vllm_engine", "tied"), ("cut_engine", "untied")])
def test_layers_that_training_leaves_alone_are_sent_once(
    names: tuple[str, str], request: pytest.FixtureRequest
) -> None:
    """Without an adapter. vLLM loads q, k and v as one: with q training the frozen k and v travel too."""
    engine, tiny = (request.getfixturevalue(name) for name in names)
    trainer = AdapterTrainer(tiny.folder, None, engine, ("embed_tokens", "lm_head", "layers.0.", "1.self_attn.k_proj"))
    trainer.prove(trainer.route, trainer.send(trainer.route, 0))
    for version in (1, 2):
        trainer.update(seed=version)
        trainer.prove(trainer.later, trainer.send(trainer.later, version))
        assert trainer.read_back() == ()
    moved = {parameter.name for parameter in trainer.later.plan.destination.parameters}
    assert {name.split(".")[-2] for name in moved} == {
        "q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "norm",
        "input_layernorm", "post_attention_layernorm", *(() if names[0] == "hf_engine" else ("k_proj",)),
    }  # fmt: skip
    assert not any("layers.0." in name for name in moved)
    deliver(engine, tiny.model, 0, [1, 2])  # as the other tests of this engine want it


@everywhere
def test_a_changed_byte_of_the_adapter_fails_its_own_slice(case: Any) -> None:
    from hybridflow.resharding.incoming import expected_checksums

    trainer = case.trainer
    trainer.update(seed=5)
    sent = expected_checksums(trainer.later.outgoing[0], trainer.trained.storages())
    name = "model.layers.1.mlp.up_proj.lora_B.weight"
    trainer.trained.storages()[name].view(torch.uint8)[-3] ^= 1
    receipt = trainer.send(trainer.later, 1)
    with pytest.raises(WeightSyncError, match=rf"1 slices other than sent: {name}"):
        verify(trainer.later.plan, sent, receipt.probe_logprobs, [receipt], 1e-4)


@everywhere
def test_read_back_names_what_of_the_adapter_differs(case: Any) -> None:
    trainer = case.trainer
    trainer.update(seed=8)
    trainer.send(trainer.later, 1)
    assert trainer.read_back() == ()
    storages = trainer.trained.storages()
    storages["model.layers.0.self_attn.o_proj.lora_A.weight"].view(3, 128)[1, 100] += 1e-3
    storages["model.layers.1.mlp.up_proj.lora_B.weight"].view(192, 3)[100, 2] += 1e-3
    last = case.workers - 1
    assert {(found.parameter, found.rank, found.low, found.high) for found in trainer.read_back()} == {
        ("model.layers.0.self_attn.o_proj.lora_A.weight", last, (1, 100, 0), (2, 101, 1)),
        ("model.layers.1.mlp.up_proj.lora_B.weight", last, (100, 2, 0), (101, 3, 1)),
    }


@in_vllm
def test_requests_held_by_a_pause_go_on_with_the_new_adapter(case: Any) -> None:
    trainer, wanted = case.trainer, [Request(i, i, [7 + i, 8, 9], 40 + i) for i in range(12)]
    groups = in_thread(case.engine, wanted, LONG)
    first = groups.get(timeout=60)
    case.engine.pause()
    trainer.update(seed=3)
    trainer.prove(trainer.later, trainer.send(trainer.later, 5))
    case.engine.resume()
    samples = {**{sample.index: sample for sample in first}, **rest(groups)}
    both = [sample for sample in samples.values() if set(sample.versions) == {0, 5}]
    assert both and all(sample.versions == sorted(sample.versions) for sample in samples.values())
    fresh = next(case.engine.generate([WANTED[0]], Sampling(max_response_tokens=8)))[0]
    exact = trainer.logprobs([*WANTED[0].prompt, *fresh.tokens])[2:]
    assert fresh.logprobs == pytest.approx(exact, abs=1e-4) and set(fresh.versions) == {5}


@in_vllm
def test_a_layer_that_vllm_has_no_adapter_for_is_named(case: Any) -> None:
    odd = ServedAdapter(3, 1.0, {"model.layers.9.mlp.up_proj": (128, 192)})
    with pytest.raises(WeightSyncError, match=r"no LoRA layer for model\.layers\.9\.mlp\.up_proj\.lora_A\.weight"):
        case.engine._rpc("serve_adapter", pickle.dumps(odd))
    case.trainer.update(seed=4)
    case.trainer.prove(case.trainer.later, case.trainer.send(case.trainer.later, 1))


def test_names_and_shapes_are_the_trainer_s(tied: Any, adapter_hf: Any) -> None:
    lora = LORA.model_copy(update={"target_modules": ["q_proj", "layers.1.mlp.down_proj"]})
    trained = AdapterTrainer(tied.folder, LORA, adapter_hf).trained.layout()
    found = {p.name: p.shape for p in trained.parameters if ".lora_" in p.name}
    assert ServedAdapter.of(tied.folder, LORA).shapes == found and len(found) == 28
    few = ServedAdapter.of(tied.folder, lora).shapes
    assert {name.rpartition(".lora_")[0] for name in few} == {
        *(f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)), "model.layers.1.mlp.down_proj",
    }  # fmt: skip


def test_an_adapter_on_one_side_only_is_named(tied: Any, hf_engine: Any, adapter_hf: Any) -> None:
    trainer = AdapterTrainer(tied.folder, LORA, adapter_hf)
    source = RankLayout.here(trainer.trained.layout())
    with pytest.raises(WeightSyncError, match=r"only the source has model\.layers\.0\.mlp\.down_proj\.lora_A\.weight"):
        plan_route([source], [RankLayout.here(hf_engine.layout())], 1 << 20)
    with pytest.raises(WeightSyncError, match="only the destination has"):
        plan_route([RankLayout.here(hf_engine.layout())], [RankLayout.here(adapter_hf.layout())], 1 << 20)


def test_vllm_is_asked_for_the_next_rank_that_it_has(tied: Any) -> None:
    pytest.importorskip("vllm", reason="vLLM is an optional extra")
    from workers.generation.vllm_device import engine_arguments

    adapter = ServedAdapter.of(tied.folder, LORA)
    arguments = engine_arguments(tied.folder, RolloutSettings(), 64, adapter)
    assert (arguments["enable_lora"], arguments["max_lora_rank"], arguments["max_loras"]) == (True, 8, 1)
    assert set(arguments["lora_target_modules"]) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"rank: found 513; vLLM's LoRA layers have ranks up to 512"):
        engine_arguments(tied.folder, RolloutSettings(), 64, replace(adapter, rank=513))


def test_models_that_vllm_cannot_serve_with_an_adapter_are_refused_before_the_start(
    tmp_path: Any, mixture: Any
) -> None:
    pytest.importorskip("vllm", reason="vLLM is an optional extra")
    from transformers import GPT2Config, GPT2LMHeadModel

    from workers.generation.vllm_device import engine_arguments

    GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=1, n_head=4, n_positions=64, vocab_size=82)).save_pretrained(
        tmp_path
    )
    adapter = ServedAdapter.of(tmp_path, LORA)
    assert adapter.layers["transformer.h.0.attn.c_attn"] == (128, 384)
    with pytest.raises(ConfigError, match="vLLM has no LoRA layers for GPT2LMHeadModel"):
        engine_arguments(tmp_path, RolloutSettings(), 64, adapter)
    with pytest.raises(ConfigError, match="mixture of experts, which vLLM on a CPU cannot run beside LoRA"):
        engine_arguments(mixture.folder, RolloutSettings(), 64, ServedAdapter.of(mixture.folder, LORA))
