"""vLLM's AsyncLLM as a generation engine: continuous batching in processes of its own, on a CPU or a GPU.

The engine's asyncio loop runs in one thread of the rank. Everything that depends on the device is in
`vllm_device.py`; nothing depends on which vLLM package is installed.
"""

import asyncio
import gc
import itertools
import pickle
import queue
import threading
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hybridflow.errors import WeightSyncError
from hybridflow.resharding.incoming import Checksum, Checksums, Incoming
from hybridflow.resharding.layout import Layout, Parameter
from hybridflow.resharding.proofs import Difference, ReadBack, Receipt
from hybridflow.resharding.published import Publication
from hybridflow.resharding.transport import Taken
from hybridflow.spans import span
from workers.generation import model_folder
from workers.generation.adapter import ServedAdapter
from workers.generation.base import Request, Sample, Sampling
from workers.generation.planned import ASLEEP, FAILED, NEW_MEMORY, refuse_other_storages
from workers.generation.requests import refuse_unfit, stop_ids
from workers.generation.settings import RolloutSettings
from workers.generation.slices import from_lists, layout_of
from workers.generation.vllm_adapter import NUMBER as ADAPTER_NUMBER
from workers.generation.vllm_device import engine_arguments, environment
from workers.training.settings import LoraSettings

T = TypeVar("T")


class VllmEngine:
    """One vLLM engine (tensor_parallel_size workers). `replica` picks its cores on a CPU. lora: of the adapter that
    the actor trains beside the model of this folder."""

    def __init__(
        self, folder: Path, settings: RolloutSettings, replica: int = 0, lora: LoraSettings | None = None
    ) -> None:
        self._adapter = None if lora is None else ServedAdapter.of(folder, lora)
        self._end_ids = model_folder.end_ids(folder)
        self._shapes = model_folder.weight_shapes(folder)
        self.max_tokens = model_folder.longest(folder, settings.max_model_len)
        self._names = itertools.count()
        self._running: dict[str, None] = {}
        self._num_aborts = 0
        self._paused = False
        self._half_written = self._after_sleep = ""
        self._cache_sleeps = False
        self._layout: Layout | None = None
        self._gpus: tuple[str, ...] = ()
        self._together: list[list[str]] = []
        self._has_all = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-loop", daemon=True)
        self._thread.start()
        with span("start_engine"):
            self._wait(self._start(folder, settings, replica))

    async def _start(self, folder: Path, settings: RolloutSettings, replica: int) -> None:
        with environment(settings, replica):
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            arguments = engine_arguments(folder, settings, self.max_tokens, self._adapter)
            self._engine: Any = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        if self._adapter is not None:
            try:
                await self._collect("serve_adapter", pickle.dumps(self._adapter))
            except WeightSyncError:
                await self._stop()
                raise
        await self._engine.update_weight_version("0")

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[Sample]]:
        """See `GenerationEngine.generate`. Closing the iterator early aborts what is left."""
        self._refuse_half_written()
        refuse_unfit(requests, sampling, self.max_tokens)
        finished: queue.SimpleQueue[list[Sample] | BaseException] = queue.SimpleQueue()
        work = asyncio.run_coroutine_threadsafe(self._draw(requests, sampling, finished), self._loop)
        try:
            for _ in dict.fromkeys(request.group for request in requests):
                group = finished.get()
                if isinstance(group, BaseException):
                    raise group
                yield group
        finally:
            work.cancel()  # does nothing when all groups are done

    def _refuse_half_written(self) -> None:
        if reason := self._half_written or (ASLEEP if self._cache_sleeps else ""):
            raise WeightSyncError(f"rollout: {reason}")

    async def _draw(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        finished: "queue.SimpleQueue[list[Sample] | BaseException]",
    ) -> None:
        """Enqueue while the engine is paused, so that it meets all requests at once and batches them in one way only;
        then hand over each group as it finishes."""
        names = {id(request): str(next(self._names)) for request in requests}
        try:
            hold = not self._running and not self._paused
            if hold:
                await self._engine.pause_generation(mode="keep", clear_cache=False)
            outputs = await self._enqueue(requests, names, sampling)
            if hold and not self._paused:
                await self._engine.resume_generation()
            groups: dict[int, list[Request]] = {}
            for request in requests:
                groups.setdefault(request.group, []).append(request)
            await asyncio.gather(*(self._finish(group, names, outputs, finished) for group in groups.values()))
        except asyncio.CancelledError:
            await self._engine.abort([name for name in names.values() if name in self._running])
            raise
        except Exception as error:  # noqa: BLE001 - handed to the caller's thread, which raises it
            finished.put(error)
        finally:
            for name in names.values():
                self._running.pop(name, None)

    async def _enqueue(self, requests: Sequence[Request], names: Mapping[int, str], sampling: Sampling) -> dict:
        num_aborts = self._num_aborts
        stops = stop_ids(sampling, self._end_ids)
        outputs = {}
        for request in requests:
            name = names[id(request)]
            prompt = {"type": "token", "prompt_token_ids": request.prompt}
            parameters = _parameters(sampling, stops, request)
            outputs[name] = await self._engine.add_request(name, prompt, parameters, **self._with_adapter())
            self._running[name] = None
        if self._num_aborts != num_aborts:  # abort() came while some were not enqueued yet
            await self._engine.abort(list(outputs))
        return outputs

    async def _finish(
        self,
        group: Sequence[Request],
        names: Mapping[int, str],
        outputs: Mapping[str, Any],
        finished: "queue.SimpleQueue[list[Sample] | BaseException]",
    ) -> None:
        samples = []
        for request in group:
            name = names[id(request)]
            output = await outputs[name].get()
            self._running.pop(name, None)
            samples.append(_sample(request.index, output.outputs[0]))
        finished.put(samples)

    def layout(self) -> Layout:
        """See `GenerationEngine.layout`: as the model's own loaders cut it, learnt once from the live workers."""
        if self._layout is None:
            shapes = {name: list(shape) for name, shape in self._shapes.items()}
            answers = self._rpc("slices", shapes)
            self._gpus = tuple(gpu for gpu in answers[0]["gpus"] if all(gpu in answer["gpus"] for answer in answers))
            dtype = answers[0]["dtype"]
            of_adapter = {} if self._adapter is None else self._adapter.shapes
            parameters = [Parameter(name, shape, dtype) for name, shape in {**self._shapes, **of_adapter}.items()]
            self._layout = layout_of(parameters, [from_lists(answer["boxes"]) for answer in answers])
            self._together = [names for answer in answers for names in answer["together"]]
        return self._layout

    def visible_gpus(self) -> tuple[str, ...]:
        """See `GenerationEngine.visible_gpus`: of the workers, not of this process."""
        self.layout()
        return self._gpus

    def together(self) -> Sequence[Sequence[str]]:
        """See `GenerationEngine.together`."""
        self.layout()
        return self._together

    def receive(
        self, version: int, incoming: Sequence[Incoming], parts: Iterable[Taken], probe: Sequence[int]
    ) -> Receipt:
        """See `GenerationEngine.receive`."""
        layout = self.layout()
        has_all, self._half_written = self._has_all and not self._half_written, FAILED
        with span("write_weights"):
            refuse_other_storages(layout, incoming, has_all)
            self._wait(self._engine.pause_generation(mode="keep", clear_cache=False))
            checksums = self._write(parts)
        self._wait(self._take_version(version))
        self._half_written, self._has_all = "", True
        with span("probe"):
            logprobs = self.probe(probe) if probe else []
        return Receipt(checksums, logprobs)

    def _write(self, parts: Iterable[Taken]) -> Checksums:
        checksums: Checksums = {}
        waiting, first = iter(parts), True
        while (taken := next(waiting, None)) is not None:
            for answer in self._rpc("receive", pickle.dumps((taken.incoming, taken.publications, first))):
                checksums |= {row: Checksum(*found) for row, found in answer["checksums"].items()}
            del taken  # and the memory that it holds
            first = False
        _refuse_unwritten(self._rpc("finish_receive"))
        return checksums

    async def _take_version(self, version: int) -> None:
        """Held requests give their blocks up, and are computed again: a block that one of them keeps would serve others
        that begin alike, with keys and values of the old weights."""
        await self._engine.reset_prefix_cache(reset_running_requests=True)
        await self._engine.update_weight_version(str(version))
        if not self._cache_sleeps:
            await self._engine.resume_generation()

    def probe(self, tokens: Sequence[int]) -> list[float]:
        """See `GenerationEngine.probe`. A forward pass of vLLM needs its cache."""
        return self._wait(self._probe(list(tokens)))

    async def _probe(self, tokens: list[int]) -> list[float]:
        """Log-probs of `tokens[1:]`. When the caller has paused the engine it is paused again afterwards."""
        if self._paused:
            await self._engine.resume_generation()
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = {"type": "token", "prompt_token_ids": tokens}
        name = f"probe-{next(self._names)}"
        waiting = await self._engine.add_request(name, prompt, parameters, **self._with_adapter())
        found = (await waiting.get()).prompt_logprobs
        if self._paused:
            await self._engine.pause_generation(mode="keep", clear_cache=False)
        return [found.logprobs[start] for start in found.start_indices[1:]]

    def read_back(self, incoming: Sequence[Incoming], publications: Sequence[Publication]) -> ReadBack:
        """See `GenerationEngine.read_back`. A CPU's packed experts cannot be read."""
        refuse_other_storages(self.layout(), incoming)
        answers = self._rpc("read_back", pickle.dumps((list(incoming), list(publications), self._shapes)))
        differences = (
            Difference(parameter, rank, tuple(low), tuple(high), largest)
            for rank, answer in enumerate(answers)
            for parameter, low, high, largest in answer["differences"]
        )
        # A head's plain and packed weight differ alike.
        return ReadBack(tuple(dict.fromkeys(differences)), tuple(answers[0]["unread"]))

    def _rpc(self, method: str, *arguments: Any) -> list[dict[str, Any]]:
        """What every tensor rank answers. One that answers `error` is named."""
        return self._wait(self._collect(method, *arguments))

    async def _collect(self, method: str, *arguments: Any) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = await self._engine.collective_rpc(method, args=arguments)
        for rank, answer in enumerate(answers):
            if "error" in answer:
                raise WeightSyncError(f"rollout, tensor rank {rank}: {answer['error']}")
        return answers

    def _with_adapter(self) -> dict[str, Any]:
        """What a request says of the adapter. Its path is never read: the workers hold it already."""
        if self._adapter is None:
            return {}
        from vllm.lora.request import LoRARequest

        return {"lora_request": LoRARequest("policy", ADAPTER_NUMBER, "policy")}

    def pause(self) -> None:
        """Freeze running requests where they are; new ones wait. Returns when nothing runs any more."""
        self._paused = True
        self._wait(self._engine.pause_generation(mode="keep", clear_cache=False))

    def resume(self) -> None:
        """Let held requests go on; not with half-new weights."""
        self._refuse_half_written()
        self._paused = False
        self._wait(self._engine.resume_generation())

    def abort(self) -> None:
        """End every running request with the tokens it has."""
        self._wait(self._abort())

    async def _abort(self) -> None:
        self._num_aborts += 1
        await self._engine.abort(list(self._running))

    def sleep(self, keep_weights: bool = False) -> None:
        """See `GenerationEngine.sleep`. vLLM's level 1 copies weights to the host, 2 drops them. A CPU engine has
        nothing to give; it only keeps the order."""
        if self._half_written == ASLEEP:
            return
        self._after_sleep, self._half_written = self._half_written if keep_weights else NEW_MEMORY, ASLEEP
        self._cache_sleeps = True
        if not _on_cpu():
            self._wait(self._engine.sleep(level=1 if keep_weights else 2, mode="keep"))

    def wake_weights(self) -> None:
        """See `GenerationEngine.wake_weights`."""
        if not _on_cpu():
            self._wait(self._engine.wake_up(tags=["weights"]))
        if self._half_written == ASLEEP:
            self._half_written = self._after_sleep

    def wake_cache(self) -> None:
        """See `GenerationEngine.wake_cache`. vLLM takes requests up again by itself; where the caller has paused the
        engine it is paused again."""
        self._cache_sleeps = False
        if not _on_cpu():
            self._wait(self._engine.wake_up(tags=["kv_cache"]))
        if self._paused:
            self._wait(self._engine.pause_generation(mode="keep", clear_cache=False))
        else:
            self._wait(self._engine.resume_generation())

    def shutdown(self) -> None:
        """End the engine's processes and this engine's thread. May be called twice."""
        if self._loop.is_closed():
            return
        self._wait(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        gc.collect()  # AsyncLLM is part of cycles; left to the interpreter's end, its __del__ fails loudly

    async def _stop(self) -> None:
        output_handler = self._engine.output_handler
        self._engine.shutdown()
        self._engine = None
        if output_handler is not None:
            await asyncio.wait([output_handler])  # it was cancelled; let it end before its loop does


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _refuse_unwritten(answers: Sequence[Mapping[str, Any]]) -> None:
    for rank, answer in enumerate(answers):
        if answer["unwritten"]:
            left = ", ".join(answer["unwritten"])
            raise WeightSyncError(f"rollout.receive: tensor rank {rank} left {left} unwritten; it must not generate")


def _parameters(sampling: Sampling, stops: Sequence[int], request: Request) -> Any:
    """Ids only: no text is made, no stop string looked for, one message a request at its end. At temperature 0 vLLM
    ignores top_p and top_k, and its log-probs are those at temperature 1."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0 if request.greedy else sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_response_tokens,
        stop_token_ids=list(stops),
        seed=request.seed,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _sample(index: int, output: Any) -> Sample:
    tokens = list(output.token_ids)
    versions: list[int] = []
    for run in output.weight_versions or ():
        versions.extend([int(run.version)] * (run.end - run.start))
    kept = output.logprobs
    logprobs = [kept.logprobs[start] for start in kept.start_indices] if tokens else []
    return Sample(index, tokens, logprobs, versions, truncated=output.finish_reason != "stop")
