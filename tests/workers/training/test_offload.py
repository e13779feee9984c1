"""Memory that an engine gives back between phases comes back bit by bit, and is really away in between."""

import errno
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from offload_ranks import CASES
from training_samples import TokenLoss, ragged_batch

from hybridflow.controller.coordinates import Coordinates, Shape
from hybridflow.errors import HybridFlowError
from tests.rank_processes import run_ranks
from workers.training import offload
from workers.training.factory import build_engine
from workers.training.offload import Stash
from workers.training.settings import EngineSettings

Results = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def results(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    folder = tmp_path_factory.mktemp("offload")
    shutil.copytree(model_folder(), folder / "model")
    run_ranks(Path(__file__).parent / "offload_ranks.py", 2, folder)
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", [" ".join(map(str, case)) for case in CASES])
def test_training_goes_on_bit_by_bit(results: list[Results], case: str) -> None:
    for rank in results:
        assert rank[case]["same"] == 1
        assert rank[case]["moved"] > 1e-3


MODEL = 16_832
"""Elements of the model."""


@pytest.mark.parametrize(
    ("case", "optimizer", "gradients"),
    [
        # Adam's two states, and float32 masters where the engine has any: times 4 bytes a weight, over both ranks.
        ("torch 0 float32", 2 * 2, 2),
        ("torch 0 bfloat16", 2 * 3, 2),
        ("deepspeed 0 float32", 2 * 2, 0),
        ("deepspeed 1 float32", 3, 0),
        ("deepspeed 2 float32", 3, 0),
        ("deepspeed 3 float32", 3, 1),
        ("deepspeed 1 bfloat16", 3, 2),
        ("deepspeed 3 bfloat16", 3, 1),
    ],
)
def test_all_of_it_is_away(results: list[Results], case: str, optimizer: int, gradients: int) -> None:
    """What a step leaves behind: no gradients under DeepSpeed but for ZeRO 3's partition and ZeRO 1's buffer for
    bfloat16."""
    for part, count in (("optimizer", optimizer), ("gradients", gradients)):
        found = sum(rank[case][part] for rank in results) / (4 * MODEL)
        assert found == pytest.approx(count, rel=0.01), part
        assert all(rank[case]["weights"] == 0 for rank in results)


CPU = torch.device("cpu")
MIB = 1 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_memory_on_a_cpu_is_given_back_to_the_system_and_views_live_on() -> None:
    whole = torch.arange(16 * MIB, dtype=torch.float32)
    view, stash = whole[MIB:].view(15, MIB), Stash(CPU)
    before = resident_bytes()
    stash.put([whole, view])
    assert stash.num_bytes == 64 * MIB
    assert before - resident_bytes() > 60 * MIB
    stash.put([whole])  # what is away stays as it is
    stash.take_back()
    assert stash.num_bytes == 0
    assert torch.equal(view.flatten(), torch.arange(MIB, 16 * MIB, dtype=torch.float32))
    whole[MIB] = -1.0
    assert view[0, 0] == -1.0


def test_what_nobody_reads_comes_back_as_zeros_without_a_copy() -> None:
    gradient, stash = torch.ones(MIB), Stash(CPU, keeps=False)
    stash.put([gradient])
    stash.take_back()
    assert torch.equal(gradient, torch.zeros(MIB))


def test_a_full_disk_is_named_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def seek(self, place: int) -> None: ...

        def write(self, window: memoryview) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(offload.tempfile, "TemporaryFile", lambda **options: Full())
    state, stash = torch.arange(8 * MIB, dtype=torch.float32), Stash(CPU)
    with pytest.raises(
        HybridFlowError, match=r"does not take 32 MiB \(No space left on device\); nothing was offloaded"
    ):
        stash.put([state])
    assert stash.num_bytes == 0 and state[-1] == 8 * MIB - 1


@pytest.fixture
def engine(model_folder: Callable[..., Path]) -> Any:
    settings = EngineSettings.model_validate({"name": "torch", "optimizer": {"lr": 1e-2}})
    return build_engine(model_folder(), settings, Coordinates(0, Shape()), "causal_lm", True)


def test_work_that_needs_what_is_away_says_so(engine: Any, tmp_path: Path) -> None:
    batch = ragged_batch(3)
    engine.train([(batch, TokenLoss())])
    before = {name: tensor.clone() for name, tensor in engine.state_dict().items()}
    engine.offload(["optimizer", "gradients"])
    for work in (
        lambda: engine.train([(batch, TokenLoss())]),
        lambda: engine.save(tmp_path),
        lambda: engine.load(tmp_path),
    ):
        with pytest.raises(HybridFlowError, match="needs the gradients and optimizer of rank 0, which are offloaded"):
            work()
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.state_dict().items())
    engine.onload()
    engine.save(tmp_path)


def test_published_weights_do_not_leave_a_cpu(engine: Any) -> None:
    with pytest.raises(HybridFlowError, match="weights in the host's memory stay"):
        engine.offload(["weights"])
