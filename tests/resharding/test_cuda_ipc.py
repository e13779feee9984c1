"""The bookkeeping of CUDA handles, with handles that a CPU has in their place; the real ones are in tests/gpu."""

import base64
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exporting_process import GPU
from torch.multiprocessing.reductions import StorageWeakRef

from hybridflow.errors import WeightSyncError
from hybridflow.resharding import cuda_ipc
from hybridflow.resharding.cuda_ipc import CudaPublication, Exported, Exports, OpenedMemory, publish_cuda
from hybridflow.resharding.cuts import Even
from hybridflow.resharding.incoming import Incoming, Outgoing
from hybridflow.resharding.layout import Parameter
from hybridflow.resharding.plan import make_plan
from hybridflow.resharding.shards import Spec, build_layout, grid
from hybridflow.resharding.sources import Topology
from hybridflow.resharding.transport import CudaIpc, PublishedMemory, RankLayout, ThroughStore, choose_transport
from tests.rank_processes import ROOT


class Descriptors:
    """Opens the handles of `exporting_process`. opened: handles in the order in which they were opened."""

    def __init__(self) -> None:
        self.opened: list[Exported] = []

    def device_of(self, gpu: str) -> int | None:
        return 0 if gpu == GPU else None

    def open(self, device: int, exported: Exported) -> torch.UntypedStorage:
        self.opened.append(exported)
        path, num_bytes = exported
        return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8).untyped_storage()


class Counting:
    """Makes handles, and counts them."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, memory: torch.UntypedStorage) -> Exported:
        self.made += 1
        return (f"handle {self.made}", memory.nbytes())


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(Path(__file__).parent / "exporting_process.py")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    yield process
    process.kill()
    process.communicate()


def published(owner: subprocess.Popen[str], line: str = "") -> CudaPublication:
    assert owner.stdin is not None and owner.stdout is not None
    if line:
        print(line, file=owner.stdin, flush=True)
    found: CudaPublication = pickle.loads(base64.b64decode(owner.stdout.readline()))
    return found


def test_another_process_reads_the_live_memory(owner: subprocess.Popen[str]) -> None:
    first, memories = published(owner), Descriptors()
    with OpenedMemory(first, memories) as opened:
        assert opened.storages["a"].tolist() == opened.storages["tied"].tolist() == [0, 1, 2, 3, 4, 5]
        assert opened.storages["b"].tolist() == [6, 7, 8, 9, 10, 11]
        assert opened.storages["c"].tolist() == [1, 1, 1] and opened.storages["c"].dtype == torch.int64
    assert opened.storages == {}
    assert len(memories.opened) == 2  # one a memory, not one a storage
    again = published(owner, "write")
    assert again.exported == first.exported
    with OpenedMemory(again, memories) as opened:
        assert opened.storages["b"].tolist() == [7, 8, 9, 10, 11, 12]


def test_a_gpu_that_is_not_seen_or_another_node_is_named() -> None:
    publication = publish_cuda(1, {"w": torch.zeros(4)}, GPU, Exports(Counting()))
    for wrong in (replace(publication, gpu="GPU-elsewhere"), replace(publication, node="elsewhere/0/1")):
        with pytest.raises(WeightSyncError, match=r"source rank 1 .*elsewhere.*does not see; plan again"):
            OpenedMemory(wrong, Descriptors()).__enter__()


def test_a_memory_is_exported_once_until_it_is_another_or_given_back() -> None:
    share = Counting()
    exports, weight = Exports(share), torch.zeros(8)
    first = exports.of(weight.untyped_storage())
    assert exports.of(weight[4:].untyped_storage()) == first and share.made == 1
    weight.untyped_storage().resize_(1 << 20)
    second = exports.of(weight.untyped_storage())
    assert second != first and share.made == 2
    exports.forget()
    assert exports.live(second) is None
    assert exports.of(weight.untyped_storage()) not in (first, second)


def test_what_was_exported_is_held_so_that_no_other_memory_is_taken_for_it() -> None:
    """torch reuses the addresses of storages that are gone."""
    exports, weight = Exports(Counting()), torch.zeros(8)
    exported = exports.of(weight.untyped_storage())
    alive = StorageWeakRef(weight.untyped_storage())
    del weight
    assert not alive.expired() and exports.live(exported) is not None
    exports.forget()
    assert alive.expired()


def test_a_process_reads_its_own_memory_without_opening_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """`runtime=local`: CUDA opens no handle in the process that made it."""
    exports, memories, weight = Exports(Counting()), Descriptors(), torch.arange(6.0)
    publication = publish_cuda(0, {"w": weight, "none": torch.empty(0)}, GPU, exports)
    with OpenedMemory(publication, memories, exports) as opened:
        assert opened.storages["w"].data_ptr() == weight.data_ptr()
        assert opened.storages["none"].numel() == 0
    assert memories.opened == []
    exports.forget()
    with pytest.raises(WeightSyncError, match="has given the memory back; publish again"):
        OpenedMemory(publication, memories, exports).__enter__()


def test_what_is_not_contiguous_cannot_be_read() -> None:
    with pytest.raises(WeightSyncError, match="rank 3, w: not contiguous"):
        publish_cuda(3, {"w": torch.zeros(4, 4).t()}, GPU, Exports(Counting()))


def test_only_what_moves_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    share = Counting()
    monkeypatch.setattr(cuda_ipc, "EXPORTS", Exports(share))
    monkeypatch.setattr(cuda_ipc.publish_cuda, "__defaults__", (cuda_ipc.EXPORTS,))
    specs = [Spec(Parameter("w", (4, 4))), Spec(Parameter("v", (4,)))]
    source, destination = build_layout(specs, grid(data=2)), build_layout(specs, grid())
    plan = make_plan(source, destination, Topology({}, {0: "a", 1: "b"}, {0: "a"}))
    held = {"w": torch.zeros(16), "v": torch.zeros(4)}
    offers = [CudaIpc().offer(Outgoing.of(plan, rank), held, None) for rank in (0, 1)]  # type: ignore[arg-type]
    assert [[part.storage for part in offer.parts] for offer in offers] == [["w", "v"], []]  # type: ignore[attr-defined]
    assert share.made == 2
    taken = CudaIpc().take([Incoming.of(plan, 0)], offers, None)  # type: ignore[arg-type]
    assert [found.rank for found in taken.publications] == [0]


@pytest.mark.parametrize(
    ("nodes", "device", "seen", "chosen"),
    [
        ("aa", "cuda", (("x", "y"), ("y", "x")), CudaIpc()),
        ("aa", "cuda", (("x",), ("y",)), ThroughStore(9, 2)),  # an engine that sees its own GPU alone cannot read both
        ("aa", "cuda", ((), ()), ThroughStore(9, 2)),  # engines on the CPU
        ("ab", "cuda", (("x", "y"), ("y", "x")), ThroughStore(9, 2)),
        ("aa", "cpu", ((), ()), PublishedMemory()),
    ],
)
def test_gpus_are_read_in_place_where_every_engine_sees_what_it_needs(
    nodes: str, device: str, seen: Any, chosen: Any
) -> None:
    """Two tensor ranks on node a, of which two engines of one worker need both halves."""
    parameter = Parameter("w", (4, 4))
    source = build_layout([Spec(parameter, "every", (Even(0),))], grid(tensor=2))
    destination = build_layout([Spec(parameter)], grid(data=2))
    plan = make_plan(source, destination, Topology({}, {0: "a", 1: "a"}, dict(enumerate(nodes))))
    gpus = [("x",), ("y",)] if device == "cuda" else [(), ()]
    one: Any = [SimpleNamespace(ranks=(rank,)) for rank in (0, 1)]
    sources = [RankLayout(one[rank], "a", device, gpus[rank]) for rank in (0, 1)]
    engines = [RankLayout(destination, node, gpus=of) for node, of in zip(nodes, seen, strict=True)]
    assert choose_transport(plan, sources, engines, 9) == chosen
