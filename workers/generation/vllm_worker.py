"""What runs inside vLLM's worker processes: taking weights in, and reading back what is held.

vLLM mixes this class into its own worker (`worker_extension_cls`), so `self.model_runner` is vLLM's. Linear weights are
repacked at load on a CPU: `reload_weights` is the only way in, and the live kernel the only way to read them back.
"""

import logging
import pickle
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from hybridflow.errors import WeightSyncError
from hybridflow.resharding.cuda_ipc import visible_gpus
from hybridflow.resharding.published import mapped
from workers.generation.vllm_loaders import Load, boxes_of, record_loads, unloaded
from workers.generation.vllm_memory import mapped_apart
from workers.generation.vllm_read_back import read_back
from workers.generation.vllm_stream import Destinations, Reload

T = TypeVar("T")
Arguments = ParamSpec("Arguments")


def _answering(method: Callable[Arguments, dict[str, T]]) -> Callable[Arguments, dict[str, T] | dict[str, str]]:
    """Answer `error` instead of raising: vLLM reads ranks' answers in order and stops at the first exception, so those
    of later ranks would be taken for answers to the next call."""

    @wraps(method)
    def answer(*args: Arguments.args, **kwargs: Arguments.kwargs) -> dict[str, T] | dict[str, str]:
        try:
            return method(*args, **kwargs)
        except WeightSyncError as error:
            return {"error": str(error)}
        except Exception as error:  # raised by the driver's side, which names the rank
            logging.getLogger(__name__).exception("rollout: a call of a vLLM worker failed")
            return {"error": f"{type(error).__name__}: {error}"}

    return answer


class WeightReceiver:
    """Worker extension of one tensor-parallel rank. A method that fails answers `error`."""

    model_runner: Any
    _loads: list[Load]
    _destinations: Destinations
    _reload: Reload | None = None

    @_answering
    def slices(self, shapes: dict[str, list[int]]) -> dict[str, Any]:
        """`boxes`: what this rank loads of each Hugging Face parameter of these shapes. `gpus`: those it sees."""
        model, config = self.model_runner.get_model(), self.model_runner.model_config
        with mapped_apart():  # until here they were by `vllm_memory.AT_START`
            self._loads = record_loads(model, config, shapes, config.dtype)
        left = sorted(unloaded(model, self._loads))
        if left:
            raise WeightSyncError(f"rollout.layout: no Hugging Face parameter is loaded into {', '.join(left)}")
        self._destinations = Destinations(self._loads, shapes)
        dtype = str(config.dtype).removeprefix("torch.")
        return {"boxes": boxes_of(self._loads, shapes), "dtype": dtype, "gpus": list(visible_gpus())}

    @_answering
    def receive(self, message: bytes) -> dict[str, Any]:
        """message: pickled (Incoming of every tensor rank, publications, whether it is the first part of a transfer).
        Answers `checksums` by row of the plan."""
        from vllm.distributed import get_tensor_model_parallel_rank

        incoming, publications, first = pickle.loads(message)
        part = incoming[get_tensor_model_parallel_rank()]
        if first:
            self._abandon()
        try:
            with mapped_apart(), mapped(publications) as sources:
                self._reload = self._reload or Reload(self.model_runner, self._destinations)
                return {"checksums": self._reload.take(part, sources)}
        except BaseException:
            self._abandon()
            raise

    @_answering
    def finish_receive(self) -> dict[str, Any]:
        """Answers `unwritten`: the engine's own parameters that nothing reached."""
        if self._reload is None:
            raise WeightSyncError("rollout.receive: no transfer has begun, so there is none to end")
        try:
            with mapped_apart():
                unwritten = self._reload.finish()
        except BaseException:
            self._abandon()
            raise
        self._reload = None
        return {"unwritten": unwritten}

    def _abandon(self) -> None:
        if self._reload is not None:
            self._reload.abandon()
        self._reload = None

    @_answering
    def read_back(self, message: bytes) -> dict[str, Any]:
        """As `receive`, but compares; answers `differences` and `unread`."""
        from vllm.distributed import get_tensor_model_parallel_rank

        incoming, publications, shapes = pickle.loads(message)
        part = incoming[get_tensor_model_parallel_rank()]
        return read_back(self.model_runner.get_model(), self._loads, shapes, part, publications)
