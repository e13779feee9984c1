"""Weights that are on a GPU: read in place through CUDA's handles, or through the store."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hybridflow.controller.local_runtime import LocalStore
from hybridflow.errors import WeightSyncError
from hybridflow.resharding.cuda_ipc import OpenedMemory, gpu_of, publish_cuda, visible_gpus
from hybridflow.resharding.incoming import Incoming, Outgoing, assemble, expected_checksums
from hybridflow.resharding.layout import Parameter
from hybridflow.resharding.plan import make_plan
from hybridflow.resharding.published import mapped
from hybridflow.resharding.shards import Spec, build_layout, grid
from hybridflow.resharding.transport import ThroughStore
from tests.gpu.owner import owner

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {"w": torch.arange(1 << 20, dtype=torch.float32), "v": torch.ones(3, dtype=torch.bfloat16)}


def test_another_process_reads_the_live_weights(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with owner(weights, tmp_path) as process:
        first = process.published()
        with OpenedMemory(first) as opened:
            assert all(opened.storages[name].device == DEVICE for name in weights)
            assert torch.equal(opened.storages["w"].cpu(), weights["w"])
            assert torch.equal(opened.storages["v"].cpu(), weights["v"])
        again = process.published("update")
        assert again.exported == first.exported
        with OpenedMemory(again) as opened:
            assert torch.equal(opened.storages["w"].cpu(), weights["w"] + 0.01)
        moved = process.published("offload")
        assert moved.exported != first.exported
        with OpenedMemory(moved) as opened:
            assert torch.equal(opened.storages["w"].cpu(), weights["w"] + 0.01)


def test_a_reader_gives_the_memory_back(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """The owner can free what it exported: else offloading weights would give nothing back."""
    large = {"w": torch.zeros(1 << 28)}  # 1 GiB
    torch.cuda.init()
    before = torch.cuda.mem_get_info(DEVICE)[0]
    with owner(large, tmp_path) as process:
        with OpenedMemory(process.published()) as opened:
            assert float(opened.storages["w"][-1]) == 0
        held = before - torch.cuda.mem_get_info(DEVICE)[0]
        with OpenedMemory(process.published("offload")) as opened:
            assert float(opened.storages["w"][0]) == 0
        assert before - torch.cuda.mem_get_info(DEVICE)[0] < 1.2 * held


def test_its_own_process_reads_without_opening(weights: dict[str, torch.Tensor]) -> None:
    live = {name: tensor.to(DEVICE) for name, tensor in weights.items()}
    with OpenedMemory(publish_cuda(0, live, gpu_of(DEVICE))) as opened:
        assert opened.storages["w"].data_ptr() == live["w"].data_ptr()


def test_a_gpu_that_is_not_there_is_named(weights: dict[str, torch.Tensor]) -> None:
    assert gpu_of(DEVICE) == visible_gpus()[0]
    with pytest.raises(WeightSyncError, match="does not see; plan again"):
        OpenedMemory(publish_cuda(0, {"w": weights["w"].to(DEVICE)}, "GPU-of-nobody")).__enter__()


def test_cuda_weights_go_through_the_store() -> None:
    specs = [Spec(Parameter("w", (64, 48))), Spec(Parameter("v", (48,), "bfloat16"))]
    plan = make_plan(build_layout(specs, grid()), build_layout(specs, grid()))
    live: dict[str, Any] = {"w": torch.randn(64 * 48, device=DEVICE)}
    live["v"] = torch.randn(48, device=DEVICE, dtype=torch.bfloat16)
    store, transport, outgoing = LocalStore(), ThroughStore(1000), Outgoing.of(plan, 0)
    taken = transport.take([Incoming.of(plan, 0)], [transport.offer(outgoing, live, store)], store)
    with mapped(taken.publications) as sources:
        found = {name: (flat, sums) for name, flat, sums in assemble(taken.incoming[0], sources)}
    assert all(torch.equal(found[name][0], live[name].cpu()) for name in live)
    received = {row: one for _, sums in found.values() for row, one in sums.items()}
    assert received == expected_checksums(outgoing, live)
