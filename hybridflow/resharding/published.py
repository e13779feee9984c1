"""Weights in shared memory: what a training rank publishes, other processes of its node read with one copy.

The CPU form of CUDA IPC. A rank's live storages are moved into shared memory once, in place, so that every alias of
them (parameters, flat buffers, the optimizer's views) goes on working; afterwards an optimizer step writes where a
reader looks. There is no bucket, no gather and no message: a reader maps `/proc/<pid>/fd/<fd>` and takes its slices.
The trainer must not step while an engine reads; the caller sees to that.
"""

import os
import resource
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from hybridflow.errors import WeightSyncError
from hybridflow.resharding.layout import dtype_of

SHARED_MEMORY = Path("/dev/shm")
SPARE_DESCRIPTORS = 256
"""Left to the rest of the process when its limit of open files is raised."""

MORE_MEMORY = "give it more (containers: --shm-size) or use a smaller model"
OTHER_TRANSPORT = "between nodes weights travel through the object store (transport.ThroughStore)"


@dataclass(frozen=True)
class Handle:
    """Where another process of the node finds one storage.

    pid, fd: the descriptor of the shared memory in its owner. inode: of that memory, since a descriptor's number may
    be taken by another file later. offset_bytes: of the first element; storage_bytes: of all of the memory.
    """

    storage: str
    dtype: str
    num_elements: int
    pid: int
    fd: int
    offset_bytes: int
    storage_bytes: int
    node: str
    inode: int


@dataclass(frozen=True)
class Publication:
    """All storages of one rank. lasting: the same memory will be read again, so a reader keeps it mapped."""

    rank: int
    node: str
    pid: int
    handles: tuple[Handle, ...]
    lasting: bool = True

    def reader(self) -> "Mapped":
        """What another process of the node reads it with."""
        return Mapped(self)


@cache
def this_node() -> str:
    """Equal for two processes exactly where each finds the other in /proc: one kernel, one namespace of processes."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{os.uname().nodename}/{boot[:8]}/{os.stat('/proc/self/ns/pid').st_ino}"


def publish(rank: int, storages: Mapping[str, Tensor], lasting: bool = True) -> Publication:
    """Move these tensors' memory into shared memory, unless it is there already, and say where it is.

    Cheap to call again: only memory that is new is moved. Raises WeightSyncError where a tensor is not contiguous or
    not on the CPU, or the node has too little shared memory or too few descriptors.
    """
    for name, tensor in storages.items():
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            order = "" if tensor.is_contiguous() else ", not contiguous"
            raise WeightSyncError(
                f"publish: rank {rank}, {name}: on {tensor.device}{order}; only contiguous tensors in the CPU's memory "
                "can be published"
            )
    memories = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in storages.values()}
    new = [memory for memory in memories.values() if memory.nbytes() and not memory.is_shared()]
    if new:
        _make_room(rank, sum(memory.nbytes() for memory in new), len(new))
    handles = tuple(_handle(name, tensor) for name, tensor in storages.items())
    return Publication(rank, this_node(), os.getpid(), handles, lasting)


def shared_bytes(rank: int, num_bytes: int) -> Tensor:
    """(num_bytes,) uint8 in shared memory, not initialised: `publish` finds it there and moves nothing."""
    _make_room(rank, num_bytes, 1)
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(num_bytes))  # type: ignore[call-overload]


def _handle(name: str, tensor: Tensor) -> Handle:
    dtype, memory = str(tensor.dtype).removeprefix("torch."), tensor.untyped_storage()
    fd, num_bytes, inode = -1, 0, 0
    if tensor.numel():
        try:
            fd, num_bytes = memory._share_fd_cpu_()  # in place; the descriptor stays open as long as the memory
        except RuntimeError as error:  # what torch says when shared memory cannot be allocated
            raise WeightSyncError(
                f"publish: {name}: {memory.nbytes() >> 20} MiB do not fit into {SHARED_MEMORY} beside what other ranks "
                f"of this node have taken ({error}); {MORE_MEMORY}"
            ) from error
        inode = os.fstat(fd).st_ino
    offset = int(tensor.storage_offset()) * tensor.element_size()
    return Handle(name, dtype, tensor.numel(), os.getpid(), fd, offset, num_bytes, this_node(), inode)


def _make_room(rank: int, num_bytes: int, num_descriptors: int) -> None:
    """Before anything moves. Other ranks of the node may take the same memory meanwhile: found when it moves."""
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < num_bytes:
        raise WeightSyncError(
            f"publish: rank {rank}: {SHARED_MEMORY} has {free >> 20} MiB free, its weights need {num_bytes >> 20} MiB; "
            f"{MORE_MEMORY}"
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + num_descriptors + SPARE_DESCRIPTORS
    if num_descriptors and wanted > soft != resource.RLIM_INFINITY:
        if hard != resource.RLIM_INFINITY and wanted > hard:
            raise WeightSyncError(
                f"publish: rank {rank}: its {num_descriptors} tensors need {wanted} open files, this process may have "
                f"{hard}; raise the limit (ulimit -Hn)"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


_last: dict[tuple[int, int], dict[int, Tensor]] = {}
"""(pid, rank) of a publisher -> what this process mapped when it last read from it, by inode. The first touch of a
mapped page is a fault, at three times the price of copying it; so the next read finds it mapped."""


class Mapped:
    """A reader's view of a publication, from entry to exit: `storages` by name, (num_elements,) each.

    They are the publisher's own memory: they change as it changes. They are not to be written to: the publisher's
    would stay as it is, the reader's no longer follow it. Raises WeightSyncError on entry, before the reader has
    written anything, where one of them cannot be read.
    """

    def __init__(self, publication: Publication) -> None:
        self.publication = publication
        self.storages: Mapping[str, Tensor] = {}

    def __enter__(self) -> "Mapped":
        if self.publication.node != this_node():
            raise WeightSyncError(
                f"{_where(self.publication)}: published on node {self.publication.node}, this process is on "
                f"{this_node()}; published memory is read on its own node, {OTHER_TRANSPORT}"
            )
        for key in [key for key in _last if not Path(f"/proc/{key[0]}").is_dir()]:
            del _last[key]
        key, known = (self.publication.pid, self.publication.rank), dict[int, Tensor]()
        before = _last.get(key, {})
        self.storages = {handle.storage: self._view(handle, known, before) for handle in self.publication.handles}
        if self.publication.lasting:
            _last[key] = known  # else memory that its owner has given up would live on here
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.storages = {}

    def _view(self, handle: Handle, known: dict[int, Tensor], before: Mapping[int, Tensor]) -> Tensor:
        dtype = dtype_of(handle.dtype)
        if not handle.num_elements:
            return torch.empty(0, dtype=dtype)
        if handle.inode not in known:
            path = self._found(handle)
            known[handle.inode] = before[handle.inode] if handle.inode in before else _map(path, handle)
        start = handle.offset_bytes
        return known[handle.inode][start : start + handle.num_elements * dtype.itemsize].view(dtype)

    def _found(self, handle: Handle) -> str:
        path = f"/proc/{handle.pid}/fd/{handle.fd}"
        try:
            found = os.stat(path)
        except FileNotFoundError as error:
            gone = "has given it up" if Path(f"/proc/{handle.pid}").is_dir() else "is gone"
            raise WeightSyncError(
                f"{_where(self.publication)}: {handle.storage}: its process {gone}; publish again, and where the rank "
                "died, resume the run from its last checkpoint"
            ) from error
        except PermissionError as error:
            raise WeightSyncError(
                f"{_where(self.publication)}: {handle.storage}: this process may not read {path} ({error.strerror}); "
                f"run both as one user; {OTHER_TRANSPORT}"
            ) from error
        if (found.st_ino, found.st_size) != (handle.inode, handle.storage_bytes):
            raise WeightSyncError(
                f"{_where(self.publication)}: {handle.storage}: its process has put other memory in its place; "
                "publish again before each transfer"
            )
        return path


def _map(path: str, handle: Handle) -> Tensor:
    return torch.from_file(path, shared=False, size=handle.storage_bytes, dtype=torch.uint8)


@contextmanager
def mapped(publications: Sequence[Publication]) -> Iterator[Mapping[int, Mapping[str, Tensor]]]:
    """Several ranks' storages by rank and name."""
    views = [publication.reader() for publication in publications]
    try:
        yield {view.publication.rank: view.__enter__().storages for view in views}
    finally:
        for view in views:
            view.__exit__(None, None, None)


def _where(publication: Publication) -> str:
    return f"published weights of source rank {publication.rank} (process {publication.pid})"
