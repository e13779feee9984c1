"""Weights in a GPU's memory, read by other processes of its node through CUDA's handles: `published` for GPUs.

A reader opens the memory where it is, on the same device or on another one that it sees, and takes its slices with one
copy from device to device. Handles are torch's own (`UntypedStorage._share_cuda_`), as `torch.multiprocessing` sends
them. Torch wraps a memory once more at each export and counts the readers of each, and a memory that has been exported
is only free when all have closed it: so here each memory is exported once and its handle kept until `forget`, and a
reader closes what it opened before it answers.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, UntypedStorage

from hybridflow.errors import WeightSyncError
from hybridflow.resharding.layout import dtype_of
from hybridflow.resharding.published import Publication, this_node

Exported = tuple[Any, ...]
"""What `_share_cuda_` answers, without the device, whose number is another one in each process."""


@dataclass(frozen=True)
class Part:
    """One storage of the layout: num_elements from offset_bytes on in the publication's memory of this number."""

    storage: str
    dtype: str
    num_elements: int
    memory: int
    offset_bytes: int


@dataclass(frozen=True)
class CudaPublication(Publication):
    """gpu: the device's UUID, by which every process knows it. exported: one a memory."""

    gpu: str = ""
    exported: tuple[Exported, ...] = ()
    parts: tuple[Part, ...] = ()

    def reader(self) -> "OpenedMemory":  # type: ignore[override]
        return OpenedMemory(self)


class Exports:
    """This process's memories that others may open, with their handles. share: makes a handle."""

    def __init__(self, share: Callable[[UntypedStorage], Exported]) -> None:
        self._share = share
        self._known: dict[int, tuple[UntypedStorage, int, Exported]] = {}

    def of(self, memory: UntypedStorage) -> Exported:
        """The same handle as long as the memory is the same. The storage object is held, so its key is not reused."""
        known = self._known.get(memory._cdata)
        if known is None or known[1] != memory.data_ptr():
            known = self._known[memory._cdata] = (memory, memory.data_ptr(), self._share(memory))
        return known[2]

    def live(self, exported: Exported) -> UntypedStorage | None:
        """The memory of a handle that this very process has made: CUDA opens none where it comes from."""
        return next((memory for memory, _, handle in self._known.values() if handle == exported), None)

    def forget(self) -> None:
        """The memories are about to be given back: an address that comes back is another memory."""
        self._known.clear()


def _share(memory: UntypedStorage) -> Exported:
    return tuple(memory._share_cuda_()[1:])  # type: ignore[no-untyped-call]


EXPORTS = Exports(_share)
"""Of this process. Forgotten by who gives the memory back (`ModelWorker.offload`)."""


def publish_cuda(rank: int, storages: Mapping[str, Tensor], gpu: str, exports: Exports = EXPORTS) -> CudaPublication:
    """Say where the live memory of these tensors on one GPU is. All that was written to it before is there to be read.

    Raises WeightSyncError where a tensor is not contiguous.
    """
    memories: dict[int, int] = {}
    exported: list[Exported] = []
    parts = []
    for name, tensor in storages.items():
        if not tensor.is_contiguous():
            raise WeightSyncError(f"publish: rank {rank}, {name}: not contiguous; only contiguous tensors can be read")
        memory, number = tensor.untyped_storage(), -1
        if tensor.numel():
            number = memories.setdefault(memory._cdata, len(exported))
            if number == len(exported):
                exported.append(exports.of(memory))
        offset = int(tensor.storage_offset()) * tensor.element_size()
        parts.append(Part(name, str(tensor.dtype).removeprefix("torch."), tensor.numel(), number, offset))
    _wait_for(tensor.device for tensor in storages.values())
    return CudaPublication(rank, this_node(), os.getpid(), (), gpu=gpu, exported=tuple(exported), parts=tuple(parts))


class Memories(Protocol):
    """How a reader gets at another process's memory."""

    def device_of(self, gpu: str) -> int | None:
        """This process's number of the GPU; None where it does not see it."""
        ...

    def open(self, device: int, exported: Exported) -> UntypedStorage: ...


class CudaMemories:
    def device_of(self, gpu: str) -> int | None:
        return next((index for index, found in enumerate(visible_gpus()) if found == gpu), None)

    def open(self, device: int, exported: Exported) -> UntypedStorage:
        torch.cuda._lazy_init()  # type: ignore[no-untyped-call]
        opened: UntypedStorage = torch.UntypedStorage._new_shared_cuda(device, *exported)  # type: ignore[attr-defined]
        return opened


class OpenedMemory:
    """A reader's view of a publication, from entry to exit: `storages` by name, (num_elements,) each, on the GPU that
    they are on. Not to be written to, nor kept beyond the exit."""

    def __init__(
        self, publication: CudaPublication, memories: Memories | None = None, exports: Exports = EXPORTS
    ) -> None:
        self.publication, self._memories, self._exports = publication, memories or CudaMemories(), exports
        self.storages: Mapping[str, Tensor] = {}

    def __enter__(self) -> "OpenedMemory":
        at = self.publication
        device = self._memories.device_of(at.gpu) if at.node == this_node() else None
        if device is None:
            raise WeightSyncError(
                f"published weights of source rank {at.rank} (process {at.pid}): on GPU {at.gpu} of node {at.node}, "
                f"which this process on {this_node()} does not see; plan again from the ranks' layouts"
            )
        opened = [self._opened(device, exported) for exported in at.exported]
        self.storages = {part.storage: _view(part, opened) for part in at.parts}
        return self

    def _opened(self, device: int, exported: Exported) -> UntypedStorage:
        if self.publication.pid != os.getpid():
            return self._memories.open(device, exported)
        memory = self._exports.live(exported)
        if memory is None:
            raise WeightSyncError(
                f"published weights of source rank {self.publication.rank}: this process has given the memory back; "
                "publish again before each transfer"
            )
        return memory

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The copies are through before the owner may write again."""
        _wait_for(tensor.device for tensor in self.storages.values())
        self.storages = {}


def visible_gpus() -> tuple[str, ...]:
    """UUIDs of the GPUs that this process sees, in its own order."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(str(torch.cuda.get_device_properties(index).uuid) for index in range(count))


def gpu_of(device: torch.device) -> str:
    """The UUID of the GPU that a tensor is on; empty for the CPU."""
    return visible_gpus()[device.index or 0] if device.type == "cuda" else ""


def _view(part: Part, opened: list[UntypedStorage]) -> Tensor:
    dtype = dtype_of(part.dtype)
    if not part.num_elements:
        return torch.empty(0, dtype=dtype)
    memory = opened[part.memory]
    whole = torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory)  # type: ignore[call-overload]
    view: Tensor = whole[part.offset_bytes : part.offset_bytes + part.num_elements * dtype.itemsize].view(dtype)
    return view


def _wait_for(devices: Iterable[torch.device]) -> None:
    for device in {device for device in devices if device.type == "cuda"}:
        torch.cuda.synchronize(device)
