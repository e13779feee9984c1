"""Memory of a training engine that is given back between phases.

A storage is emptied and later filled again in place. The tensors on it, and every view that the engine and its
optimizer keep of them, stay the same objects: so this works on DeepSpeed's flat buffers too, of any ZeRO stage, where
DeepSpeed's own `offload_states` wants one of its own optimizers.
"""

import ctypes
import gc
import tempfile
from collections.abc import Iterable, Sequence
from typing import IO

import torch
from torch import Tensor, UntypedStorage

from hybridflow.errors import HybridFlowError


class Stash:
    """One part of an engine's memory on one device.

    What is on a GPU is copied to pinned memory of the host, which is kept for the next time. What is in the host's
    memory goes to an unnamed file in the temporary folder (TMPDIR): there is nowhere else. keeps: whether the content
    matters; else it is zeros afterwards, and nothing is copied.
    """

    def __init__(self, device: torch.device, keeps: bool = True) -> None:
        self.device, self.keeps = device, keeps
        self._emptied: list[tuple[UntypedStorage, int]] = []
        self._host: Tensor | None = None
        self._file: IO[bytes] | None = None

    @property
    def num_bytes(self) -> int:
        """What is away."""
        return sum(size for _, size in self._emptied)

    def put(self, tensors: Iterable[Tensor]) -> None:
        """Empty the memory of these tensors, of those on this engine's device. Nothing happens to what is away."""
        if self._emptied:
            return
        found = memories(tensor for tensor in tensors if tensor.device == self.device)
        if self.keeps:
            self._copy_away(found)
        self._emptied = [(memory, memory.nbytes()) for memory in found]
        for memory in found:
            memory.resize_(0)
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()  # else the allocator keeps it from the other processes of this device

    def take_back(self) -> None:
        """Everything where it was, at once or not at all."""
        filled = 0
        for memory, size in self._emptied:
            memory.resize_(size)
        for memory, size in self._emptied:
            if not self.keeps:
                _bytes_of(memory).zero_()
            elif self._host is not None:
                _bytes_of(memory).copy_(self._host[filled : filled + size])
            else:
                self._read(_window(memory))
            filled += size
        self._emptied = []

    def _copy_away(self, found: Sequence[UntypedStorage]) -> None:
        if self.device.type == "cuda":
            total, filled = sum(memory.nbytes() for memory in found), 0
            if self._host is None or self._host.nbytes != total:
                self._host = torch.empty(total, dtype=torch.uint8, pin_memory=True)
            for memory in found:
                self._host[filled : filled + memory.nbytes()].copy_(_bytes_of(memory))
                filled += memory.nbytes()
            return
        file = self._file = self._file or tempfile.TemporaryFile(prefix="hybridflow-offload-")  # noqa: SIM115 (kept)
        file.seek(0)
        try:
            for memory in found:
                file.write(_window(memory))
            file.flush()
        except OSError as error:
            raise HybridFlowError(
                f"offload: the temporary folder {tempfile.gettempdir()} does not take "
                f"{sum(memory.nbytes() for memory in found) >> 20} MiB ({error.strerror}); nothing was offloaded. Set "
                "TMPDIR to a disk with room, or leave schedule.offload out on a CPU"
            ) from error
        file.seek(0)

    def _read(self, window: memoryview) -> None:
        assert self._file is not None
        while window:
            count = self._file.readinto(window)  # type: ignore[attr-defined]
            if not count:
                raise HybridFlowError("offload: the temporary file is shorter than what was written; resume the run")
            window = window[count:]


def move_loaded_states(optimizer: torch.optim.Optimizer) -> None:
    """Into memory of their own: that of tensors which `torch.load` made cannot be emptied."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and not value.untyped_storage().resizable():
                state[key] = value.clone()


def memories(tensors: Iterable[Tensor]) -> list[UntypedStorage]:
    """The tensors' memory, each once."""
    found = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return [memory for memory in found.values() if memory.nbytes()]


def _bytes_of(memory: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory)  # type: ignore[call-overload]


def _window(memory: UntypedStorage) -> memoryview:
    """The host's memory itself. A numpy view would forbid to resize it for ever."""
    return memoryview((ctypes.c_char * memory.nbytes()).from_address(memory.data_ptr())).cast("B")
