"""Memory that engines and trainers give back, measured on the device; and a run in which they take turns."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_samples import TokenLoss, ragged_batch

from hybridflow import cli
from hybridflow.controller.coordinates import Coordinates, Shape
from hybridflow.resharding.cuda_ipc import visible_gpus
from hybridflow.resharding.incoming import Incoming
from hybridflow.resharding.plan import make_plan
from hybridflow.resharding.shards import Spec, build_layout, grid
from tests.gpu.owner import owner
from tests.rank_processes import free_port
from tests.workers.generation.conftest import save_folder
from tests.workers.generation.trainer import Trainer, incoming, receive
from workers.generation.base import Request, Sampling
from workers.training.factory import build_engine
from workers.training.settings import EngineSettings

DEVICE = torch.device("cuda", 0)
GIB = 1 << 30
PROBE = [3, 4, 5, 6]
REQUESTS = [Request(row, row // 2, [7, 8 + row], seed=row) for row in range(6)]
SIZES = {"hidden_size": 256, "intermediate_size": 512}  # attention heads of 64
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}  # some 130 M weights


def used() -> int:
    """Bytes of the device, of all processes."""
    free, total = torch.cuda.mem_get_info(DEVICE)
    return total - free


@pytest.mark.parametrize("name", ["torch", "deepspeed"])
def test_a_trainer_gives_back_what_it_offloads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0", "WORLD_SIZE": "1"}
    for key, value in ranks.items():
        monkeypatch.setenv(key, value)
    save_folder(tmp_path, "Qwen2", **LARGE)
    settings = EngineSettings.model_validate({"name": name, "optimizer": {"lr": 1e-3}})
    engine: Any = build_engine(tmp_path, settings, Coordinates(0, Shape()), "causal_lm", True)
    batch = ragged_batch(4)
    engine.train([(batch, TokenLoss())])
    before = {key: tensor.clone() for key, tensor in engine.state_dict().items()}
    size = sum(tensor.nbytes for tensor in engine.scorer.parameters())
    torch.cuda.empty_cache()
    whole = used()
    engine.offload(["optimizer", "gradients"])
    assert whole - used() > 1.9 * size  # at least Adam's two states
    assert torch.isfinite(engine.forward(batch, ("logprobs",), 1.0)["logprobs"].flat).all()
    torch.cuda.empty_cache()
    engine.offload(["weights"])
    assert whole - used() > 2.9 * size
    engine.onload()
    after = engine.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert engine.train([(batch, TokenLoss())])["grad_norm"].value > 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("model")
    return folder, save_folder(folder, "Qwen2", **SIZES)


@pytest.fixture(scope="module")
def engine(model: tuple[Path, Any]) -> Iterator[Any]:
    pytest.importorskip("vllm")
    from workers.generation.settings import RolloutSettings
    from workers.generation.vllm_engine import VllmEngine

    made = VllmEngine(model[0], RolloutSettings(kv_cache_gib=2.0, max_num_seqs=32))
    yield made
    made.shutdown()


def drawn(engine: Any) -> list[list[int]]:
    groups = engine.generate(REQUESTS, Sampling(max_response_tokens=12))
    return [sample.tokens for sample in sorted((s for group in groups for s in group), key=lambda s: s.index)]


def test_an_engine_sleeps_and_wakes_in_the_order_of_the_phase_change(engine: Any, model: tuple[Path, Any]) -> None:
    trainer = Trainer(model[1])
    parts = incoming(trainer.plan(engine))
    receive(engine, 1, parts, trainer.publications, PROBE)
    before, awake = drawn(engine), used()
    engine.pause()
    engine.sleep()
    asleep = used()
    assert awake - asleep > 1.9 * GIB
    engine.wake_weights()
    assert used() < asleep + GIB  # the cache sleeps on
    assert receive(engine, 2, parts, trainer.publications, []).probe_logprobs == []
    engine.wake_cache()
    assert abs(used() - awake) < GIB / 4
    assert engine.probe(PROBE) == pytest.approx(trainer.logprobs(PROBE), abs=1e-3)
    engine.resume()
    assert not engine.read_back(parts, trainer.publications).differences
    assert drawn(engine) == before


def test_an_engine_reads_weights_on_its_gpu_through_handles(
    engine: Any, model: tuple[Path, Any], tmp_path: Path
) -> None:
    """Colocated: the trainer's process and the engine's worker on one device."""
    assert visible_gpus()[0] in engine.visible_gpus()
    wanted = engine.layout()
    plan = make_plan(build_layout([Spec(parameter) for parameter in wanted.parameters], grid()), wanted)
    parts = [Incoming.of(plan, 0)]
    with owner(model[1].state_dict(), tmp_path) as process:
        receive(engine, 3, parts, [process.published("update")], PROBE)
        assert not engine.read_back(parts, [process.published()]).differences


def metrics(folder: Path, *overrides: str) -> list[dict[str, float]]:
    reward = folder.with_suffix(".py")
    reward.write_text("def score(prompt, response, answer, **row):\n    return sum(map(str.isdigit, response)) / 8\n")
    given = ["algorithm=ppo", "trainer.steps=3", "trainer.prompts_per_step=8", f"run_folder={folder}"]
    given += ["reward=function", f"reward.function={reward}:score", *overrides]
    assert cli.main(["train", *given, "placement=single", "placement.pools.all.gpus_per_rank=1"]) == 0
    lines = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "actor/loss" in line]


@pytest.mark.parametrize("weights", [[], ["weights"]])
def test_a_colocated_run_takes_turns(tmp_path: Path, weights: list[str]) -> None:
    parts = ", ".join(["optimizer", "gradients", *weights])
    found = metrics(tmp_path / "turns", f"schedule.offload={{actor: [{parts}], critic: [optimizer, gradients]}}")
    assert {"timing_s/sleep", "timing_s/wake", "timing_s/offload", "timing_s/onload"} <= found[0].keys()
    assert [line["sync/version"] for line in found] == [1, 2, 3]
    together = metrics(tmp_path / "together", "schedule.sleep=never", "schedule.offload={}")
    assert "timing_s/sleep" not in together[0]
    for ours, theirs in zip(found, together, strict=True):
        assert ours["critic/loss"] == pytest.approx(theirs["critic/loss"], rel=0.05)
