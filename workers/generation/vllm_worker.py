"""What runs inside vLLM's worker processes: taking weights in, and reading back what is held.

vLLM mixes this class into its own worker (`worker_extension_cls`), so `self.model_runner` is vLLM's. Linear weights are
repacked at load on a CPU: `reload_weights` is the only way in, and the live kernel the only way to read them back.
"""

import logging
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from hybridflow.errors import WeightSyncError
from hybridflow.resharding.cuda_ipc import visible_gpus
from hybridflow.resharding.incoming import Incoming
from hybridflow.resharding.published import mapped
from workers.generation.vllm_adapter import Place, clear, compare, register, serve, write
from workers.generation.vllm_loaders import Load, boxes_of, loaded_together, record_loads, unloaded
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
    _receiving = False
    _places: Sequence[Place] = ()

    @_answering
    def serve_adapter(self, message: bytes) -> dict[str, Any]:
        """message: a pickled ServedAdapter, for which every request will ask."""
        self._places = serve(self.model_runner, pickle.loads(message))
        return {}

    @_answering
    def slices(self, shapes: dict[str, list[int]]) -> dict[str, Any]:
        """`boxes`: what this rank loads of each Hugging Face parameter of these shapes, and what it holds of the
        adapter. `together`: parameters that are loaded together or not at all. `gpus`: those it sees."""
        model, config = self.model_runner.get_model(), self.model_runner.model_config
        with mapped_apart():  # until here they were by `vllm_memory.AT_START`
            self._loads = record_loads(model, config, shapes, config.dtype)
        left = sorted(unloaded(model, self._loads))
        if left:
            raise WeightSyncError(f"rollout.layout: no Hugging Face parameter is loaded into {', '.join(left)}")
        self._destinations = Destinations(self._loads, shapes)
        dtype = str(config.dtype).removeprefix("torch.")
        boxes = boxes_of(self._loads, shapes) | {place.parameter: [place.box] for place in self._places}
        together = loaded_together(self._loads)
        return {"boxes": boxes, "together": together, "dtype": dtype, "gpus": list(visible_gpus())}

    @_answering
    def receive(self, message: bytes) -> dict[str, Any]:
        """message: pickled (Incoming of every tensor rank, publications, whether it is the first part of a transfer).
        Answers `checksums` by row of the plan."""
        from vllm.distributed import get_tensor_model_parallel_rank

        incoming, publications, first = pickle.loads(message)
        weights, adapter = self._split(incoming[get_tensor_model_parallel_rank()])
        if first:
            self._abandon()
            self._reload, self._receiving = self._begin(weights.only), True
        try:
            with mapped_apart(), mapped(publications) as sources:
                checksums = write(self._places, adapter, sources)
                return {"checksums": checksums | (self._reload.take(weights, sources) if self._reload else {})}
        except BaseException:
            self._abandon()
            raise

    @_answering
    def finish_receive(self) -> dict[str, Any]:
        """Answers `unwritten`: the engine's own parameters that nothing reached."""
        if not self._receiving:
            raise WeightSyncError("rollout.receive: no transfer has begun, so there is none to end")
        try:
            with mapped_apart():
                unwritten = self._reload.finish() if self._reload else []
        except BaseException:
            self._abandon()
            raise
        if self._places:
            register(self.model_runner)
        self._reload, self._receiving = None, False
        return {"unwritten": unwritten}

    def _split(self, part: Incoming) -> tuple[Incoming, Incoming]:
        """What vLLM's layers take as weights, and what goes to the adapter's places."""
        names = {place.parameter for place in self._places}
        weights = tuple(filling for filling in part.fillings if filling.storage.name not in names)
        adapter = tuple(filling for filling in part.fillings if filling.storage.name in names)
        return replace(part, fillings=weights), replace(part, fillings=adapter)

    def _begin(self, only: frozenset[str] | None) -> Reload | None:
        """None where nothing but the adapter comes. A reload wakes layers whose memory may hold anything."""
        every = self._destinations.targets.keys()
        names = every if only is None else every & only
        if not names:
            return None
        if self._places:
            clear(self.model_runner)
        return Reload(self.model_runner, self._destinations, names)

    def _abandon(self) -> None:
        if self._reload is not None:
            self._reload.abandon()
        self._reload, self._receiving = None, False

    @_answering
    def read_back(self, message: bytes) -> dict[str, Any]:
        """As `receive`, but compares; answers `differences` and `unread`."""
        from vllm.distributed import get_tensor_model_parallel_rank

        incoming, publications, shapes = pickle.loads(message)
        weights, adapter = self._split(incoming[get_tensor_model_parallel_rank()])
        answer = read_back(self.model_runner.get_model(), self._loads, shapes, weights, publications)
        with mapped(publications) as sources:
            answer["differences"] += compare(self._places, adapter, sources)
        return answer
