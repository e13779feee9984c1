"""Two real processes: one publishes, the other (this one) reads."""

import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp
from publishing_process import publisher

from hybridflow.errors import WeightSyncError
from hybridflow.resharding import published
from hybridflow.resharding.published import Mapped, mapped, publish


class Publisher:
    def __init__(self):
        context = mp.get_context("forkserver")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=publisher, args=(theirs,), daemon=True)
        self.process.start()
        self.publication = self.pipe.recv()

    def do(self, what):
        self.pipe.send(what)
        return self.pipe.recv()


@pytest.fixture
def other():
    held = Publisher()
    yield held
    if held.process.is_alive():
        held.process.kill()
    held.process.join(30)


def test_another_process_reads_the_publishers_memory(other):
    assert other.publication.pid != os.getpid()
    with Mapped(other.publication) as view:
        assert torch.equal(view.storages["flat"], torch.arange(100.0))
        assert torch.equal(view.storages["part"], torch.arange(60.0, 80.0))
        assert torch.equal(view.storages["half"], torch.arange(8).to(torch.bfloat16))
        assert view.storages["none"].numel() == 0
    assert not view.storages


def test_updates_in_place_are_seen_without_publishing_again(other):
    with Mapped(other.publication) as view:
        other.do("step")
        assert view.storages["flat"][:10].tolist() == [-float(i) for i in range(10)]
        assert view.storages["part"][0] == view.storages["flat"][60] == 7.5
    assert other.do("again") == other.publication  # nothing moved a second time


def test_what_a_reader_writes_stays_its_own(other):
    with Mapped(other.publication) as view:
        view.storages["flat"].fill_(9.0)
    published._last.clear()  # a new reader
    with Mapped(other.publication) as view:
        assert torch.equal(view.storages["flat"], torch.arange(100.0))


def test_a_reader_maps_once_and_forgets_who_is_gone(other, monkeypatch):
    maps = []
    mapping = published._map
    monkeypatch.setattr(published, "_map", lambda path, handle: maps.append(path) or mapping(path, handle))
    for _ in range(3):
        with Mapped(other.publication) as view:
            other.do("step")
            assert view.storages["part"][0] == 7.5
    assert len(maps) == 2  # `flat` and `part` are one memory, `half` another, `none` is nothing
    assert (other.publication.pid, 3) in published._last
    other.process.kill()
    other.process.join(30)
    own = torch.zeros(3)
    with mapped([publish(0, {"w": own})]):
        assert (other.publication.pid, 3) not in published._last


def test_memory_that_was_replaced_is_not_read(other):
    other.do("replace")
    with pytest.raises(WeightSyncError, match=r"source rank 3 .*flat: its process has (given it up|put other memory)"):
        Mapped(other.publication).__enter__()


def test_a_dead_publisher_is_named(other):
    other.process.kill()
    other.process.join(30)
    pid = other.publication.pid
    with (
        pytest.raises(WeightSyncError, match=rf"source rank 3 \(process {pid}\): flat: its process is gone"),
        mapped([other.publication]),
    ):
        pass


def test_another_node_is_refused_and_told_of_the_other_transport(other):
    away = replace(other.publication, node="elsewhere/1/2")
    expected = re.escape(f"published on node elsewhere/1/2, this process is on {published.this_node()}")
    with pytest.raises(WeightSyncError, match=f"{expected}.*object store"):
        Mapped(away).__enter__()


def test_several_ranks_and_the_own_process():
    one, two = torch.arange(3.0), torch.arange(4.0)
    with mapped([publish(0, {"w": one}), publish(1, {"w": two})]) as sources:
        two.add_(1)
        assert torch.equal(sources[0]["w"], torch.arange(3.0))
        assert torch.equal(sources[1]["w"], torch.arange(1.0, 5.0))


def test_what_cannot_be_published_is_refused_with_its_name(monkeypatch):
    with pytest.raises(WeightSyncError, match="rank 1, w: on cpu, not contiguous"):
        publish(1, {"w": torch.zeros(4, 4).t()})
    weights = {"w": torch.zeros(1 << 20)}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(WeightSyncError, match="has 0 MiB free, its weights need 4 MiB"):
        publish(1, weights)
    assert not weights["w"].is_shared()


def test_shared_memory_that_another_rank_took_meanwhile_is_named(monkeypatch):
    def taken(memory):
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", taken)
    with pytest.raises(WeightSyncError, match=r"w: 4 MiB do not fit into /dev/shm beside.*--shm-size"):
        publish(1, {"w": torch.zeros(1 << 20)})


def test_the_limit_of_open_files_is_raised_or_named(monkeypatch):
    limits = {"now": (100, 1000)}
    monkeypatch.setattr(published.resource, "getrlimit", lambda which: limits["now"])
    monkeypatch.setattr(published.resource, "setrlimit", lambda which, wanted: limits.update(now=wanted))
    publish(0, {str(i): torch.zeros(1) for i in range(3)})
    assert 259 <= limits["now"][0] <= 1000
    limits["now"] = (100, 100)
    with pytest.raises(WeightSyncError, match=r"3 tensors need \d+ open files, this process may have 100"):
        publish(0, {str(i): torch.zeros(1) for i in range(3)})


def test_memory_that_will_not_be_read_again_is_let_go(other):
    """What comes through the store is another memory at each sync: a reader that kept it would hold the model twice."""
    once = replace(other.publication, lasting=False)
    with Mapped(once) as view:
        assert torch.equal(view.storages["flat"], torch.arange(100.0))
    assert (once.pid, once.rank) not in published._last
