"""What needs two GPUs: tensor-parallel training and planned transfers on nccl groups."""

import json
from pathlib import Path

import nccl_ranks
import pytest
import torch
import torch.multiprocessing as mp
from training_samples import QWEN2

from hybridflow.resharding.cuts import Even
from hybridflow.resharding.layout import Parameter
from hybridflow.resharding.plan import make_plan
from hybridflow.resharding.shards import Spec, build_layout, grid
from hybridflow.resharding.transfer import Processes, execute_here
from tests.rank_processes import run_ranks
from workers.training.modeling import initialise

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
TRAINING = Path(__file__).parents[1] / "workers/training"
LLAMA = {**QWEN2, "model_type": "llama", "tie_word_embeddings": False}
QWEN3 = {**QWEN2, "model_type": "qwen3", "head_dim": 8}


def test_two_tensor_ranks_train_as_one_rank_on_nccl(tmp_path: Path) -> None:
    """The program of tests/workers/training/test_tensor_parallel.py: its ranks take nccl where they see GPUs."""
    for name, config in (("qwen2", QWEN2), ("llama", LLAMA), ("qwen3", QWEN3)):
        initialise(config, tmp_path / name, seed=3)
    run_ranks(TRAINING / "tensor_ranks.py", 2, tmp_path)
    for rank in range(2):
        results = json.loads((tmp_path / f"result-{rank}.json").read_text())
        for case in ("llama 2", "qwen3 0", "qwen3 3", "critic 0", "critic 3"):
            found = results[f"equal {case}"]
            assert found["forward"] <= 1e-4 and found["weights"] <= 1e-3 and found["norm"] <= 1e-3
            assert found["clipped"] == found["names"] == 1


def test_state_that_leaves_the_device_comes_back_bit_by_bit_under_zero(tmp_path: Path) -> None:
    """The program of tests/workers/training/test_offload.py, ZeRO 0 to 3."""
    initialise(QWEN2, tmp_path / "model", seed=3)
    run_ranks(TRAINING / "offload_ranks.py", 2, tmp_path)
    for rank in range(2):
        results = json.loads((tmp_path / f"result-{rank}.json").read_text())
        assert all(found["optimizer"] > 0 and found["moved"] > 1e-3 for found in results.values())
        assert {case for case, found in results.items() if not found["same"]} == set()


@pytest.mark.parametrize("bucket_bytes", [1000, 1 << 20])
def test_a_plan_is_executed_on_an_nccl_group(tmp_path: Path, bucket_bytes: int) -> None:
    """One training rank's weights on one GPU to two tensor ranks, both on the other."""
    parameters = [Parameter("w", (64, 48)), Parameter("v", (48,), "bfloat16")]
    source = build_layout([Spec(parameter) for parameter in parameters], grid())
    destination = build_layout([Spec(p, "every", (Even(0),)) for p in parameters], grid(tensor=2))
    plan = make_plan(source, destination)
    processes = Processes({0: 0}, {0: 1, 1: 1})
    held = {0: {"w": torch.randn(64 * 48), "v": torch.randn(48).bfloat16()}}
    expected = {rank: dict(plan.destination.allocate(rank)) for rank in (0, 1)}
    execute_here(plan, held, expected)
    arguments = (2, str(tmp_path), plan, processes, held, bucket_bytes)
    mp.start_processes(nccl_ranks.moved, arguments, nprocs=2, join=True, start_method="spawn")
    found = torch.load(tmp_path / "result1", weights_only=False)
    assert all(torch.equal(found[rank][name], flat) for rank in (0, 1) for name, flat in expected[rank].items())
