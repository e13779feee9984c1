"""Hugging Face `generate` as a generation engine: in the rank's own process, on any device."""

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteriaList
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hybridflow.errors import WeightSyncError
from hybridflow.resharding.boxes import three_axes
from hybridflow.resharding.cuda_ipc import visible_gpus
from hybridflow.resharding.incoming import Checksums, Incoming, assemble
from hybridflow.resharding.layout import Layout, Parameter
from hybridflow.resharding.proofs import Difference, ReadBack, Receipt
from hybridflow.resharding.published import Publication, mapped
from hybridflow.resharding.transport import Taken
from hybridflow.spans import span
from workers.generation import model_folder
from workers.generation.adapter import served_settings
from workers.generation.base import Request, Sample, Sampling
from workers.generation.gate import Gate
from workers.generation.planned import ASLEEP, FAILED, NEW_MEMORY, refuse_other_storages
from workers.generation.requests import refuse_unfit, stop_ids
from workers.generation.seeded_draw import SeededDraw, uniforms
from workers.generation.settings import RolloutSettings
from workers.generation.slices import difference_box, layout_of
from workers.training.lora import Adapter
from workers.training.settings import LoraSettings


class HfEngine:
    """Static batches of at most `max_num_seqs` rows of similar prompt length.

    A step of decoding and a weight transfer exclude each other: both go through `Gate`.
    """

    def __init__(
        self, folder: Path, settings: RolloutSettings, replica: int = 0, lora: LoraSettings | None = None
    ) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, settings.dtype)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._adapter = None if lora is None else Adapter(self._model, served_settings(lora), folder, "CAUSAL_LM")
        self._model.to(self._device).eval().requires_grad_(False)
        self._model.generation_config = GenerationConfig()  # the request alone says how to sample
        if settings.float32_head:
            _head_in_float32(self._model)
        self._end_ids = model_folder.end_ids(folder)
        self.max_tokens = model_folder.longest(folder, settings.max_model_len)
        self._rows_per_batch = settings.max_num_seqs
        self._version = 0
        self._half_written = self._after_sleep = ""
        self._has_all = False
        self._shapes: list[torch.Size] = []
        self._gate = Gate()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[Sample]]:
        """See `GenerationEngine.generate`. Groups are kept together, shortest prompts first."""
        self._refuse_half_written()
        refuse_unfit(requests, sampling, self.max_tokens)
        aborts = self._gate.num_aborts
        groups: dict[int, list[Request]] = {}
        for request in requests:
            groups.setdefault(request.group, []).append(request)
        by_length = sorted(groups.values(), key=lambda group: max(len(request.prompt) for request in group))
        rows = [request for group in by_length for request in group]
        done: dict[int, Sample] = {}
        waiting = iter(by_length)
        group = next(waiting, None)
        for start in range(0, len(rows), self._rows_per_batch):
            part = rows[start : start + self._rows_per_batch]
            for request, sample in zip(part, self._decode(part, sampling, aborts), strict=True):
                done[id(request)] = sample
            while group is not None and all(id(request) in done for request in group):
                yield [done.pop(id(request)) for request in group]
                group = next(waiting, None)

    @torch.no_grad()
    def _decode(self, rows: Sequence[Request], sampling: Sampling, aborts: int) -> list[Sample]:
        width = max(len(request.prompt) for request in rows)
        ids_BT = torch.zeros((len(rows), width), dtype=torch.int64)
        mask_BT = torch.zeros((len(rows), width), dtype=torch.int64)
        for row, request in enumerate(rows):  # left-padded: all rows decode at the same slot
            ids_BT[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask_BT[row, width - len(request.prompt) :] = 1
        draw = SeededDraw(
            uniforms([request.seed for request in rows], sampling.max_response_tokens),
            version=lambda: self._version,
            greedy_B=torch.tensor([request.greedy or sampling.temperature == 0 for request in rows]),
            warp=LogitsProcessorList(_warpers(sampling)),
        )
        stops = stop_ids(sampling, self._end_ids)
        with span("decode"), self._gate.entered(aborts) as steps:
            if steps.aborted():
                return [Sample(request.index, [], [], [], truncated=True) for request in rows]
            out_BT = self._model.generate(
                input_ids=ids_BT.to(self._device),
                attention_mask=mask_BT.to(self._device),
                logits_processor=LogitsProcessorList([draw]),
                stopping_criteria=StoppingCriteriaList([steps]),
                max_new_tokens=sampling.max_response_tokens,
                do_sample=False,
                eos_token_id=list(stops) or None,
                pad_token_id=stops[0] if stops else 0,
            )
        return _samples(rows, out_BT[:, width:].cpu(), draw, stops)

    def layout(self) -> Layout:
        """See `GenerationEngine.layout`: every parameter whole, in this process."""
        held = self._held()
        parameters = [
            Parameter(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in held.items()
        ]
        return layout_of(parameters, [{name: [((0, 0, 0), three_axes(held[name].shape))] for name in held}])

    def visible_gpus(self) -> tuple[str, ...]:
        """See `GenerationEngine.visible_gpus`."""
        return visible_gpus()

    def together(self) -> Sequence[Sequence[str]]:
        """See `GenerationEngine.together`."""
        return ()

    def _held(self) -> dict[str, Tensor]:
        """Live tensors under the trainer's names: plain weights, and A and B of the adapter beside them."""
        state = self._model.state_dict()
        return state if self._adapter is None else self._adapter.named(state)

    def receive(
        self, version: int, incoming: Sequence[Incoming], parts: Iterable[Taken], probe: Sequence[int]
    ) -> Receipt:
        """See `GenerationEngine.receive`: one copy, into the model's own parameters."""
        with self._gate.stopped():
            has_all, self._half_written = self._has_all and not self._half_written, FAILED
            refuse_other_storages(self.layout(), incoming, has_all)
            with span("write_weights"):
                checksums = self._write(parts)
            self._version = version
            self._half_written, self._has_all = "", True
            with span("probe"):
                return Receipt(checksums, self.probe(probe) if probe else [])

    def _write(self, parts: Iterable[Taken]) -> Checksums:
        checksums: Checksums = {}
        waiting = iter(parts)
        while (taken := next(waiting, None)) is not None:
            with mapped(taken.publications) as sources:
                checksums |= self._assemble(taken.incoming[0], sources)
            del taken, sources  # and the memory that they hold
        return checksums

    def _assemble(self, incoming: Incoming, sources: Mapping[int, Mapping[str, Tensor]]) -> Checksums:
        """A tied parameter comes twice, and lies in one memory: the second must equal the first."""
        held = self._held()
        first: dict[int, str] = {}
        twins = {name for name, tensor in held.items() if first.setdefault(tensor.data_ptr(), name) != name}
        own = [filling for filling in incoming.fillings if filling.storage.name not in twins]
        tied = [filling for filling in incoming.fillings if filling.storage.name in twins]
        checksums: Checksums = {}
        for _, _, sums in assemble(Incoming(incoming.rank, tuple(own)), sources, into=held):
            checksums.update(sums)
        for name, flat, sums in assemble(Incoming(incoming.rank, tuple(tied)), sources):
            checksums.update(sums)
            if not torch.equal(flat, held[name].view(-1).cpu()):
                raise WeightSyncError(
                    f"rollout.receive: after the transfer the model does not hold the {name} that was sent. "
                    f"A tied {name} must equal the embedding it is tied to"
                )
        return checksums

    def read_back(self, incoming: Sequence[Incoming], publications: Sequence[Publication]) -> ReadBack:
        """See `GenerationEngine.read_back`."""
        refuse_other_storages(self.layout(), incoming)
        held, found = self._held(), []
        with mapped(publications) as sources:
            for name, flat, _ in assemble(incoming[0], sources):
                ours, wanted = held[name].cpu(), flat.view(held[name].shape)
                box = difference_box(((0, 0, 0), three_axes(ours.shape)), ours, wanted)
                if box is not None:
                    found.append(Difference(name, 0, *box, float((ours.double() - wanted.double()).abs().max())))
        return ReadBack(tuple(found))

    @torch.no_grad()
    def probe(self, tokens: Sequence[int]) -> list[float]:
        """See `GenerationEngine.probe`."""
        ids_1T = torch.tensor([list(tokens)], device=self._device)
        logprobs_TV = self._model(ids_1T).logits[0, :-1].float().log_softmax(-1)
        return logprobs_TV.gather(-1, ids_1T[0, 1:, None])[:, 0].tolist()

    def pause(self) -> None:
        """Freeze after the step that runs. Returns when nothing runs any more."""
        self._gate.pause()

    def resume(self) -> None:
        """Let held requests go on; not with half-new weights."""
        self._refuse_half_written()
        self._gate.resume()

    def _refuse_half_written(self) -> None:
        if self._half_written:
            raise WeightSyncError(f"rollout: {self._half_written}")

    def abort(self) -> None:
        """End every running request with the tokens it has."""
        self._gate.abort()

    def sleep(self, keep_weights: bool = False) -> None:
        """See `GenerationEngine.sleep`. Caches live no longer than their requests. On a CPU weights that are kept stay
        where they are."""
        with self._gate.stopped():
            if self._half_written == ASLEEP:
                return
            self._after_sleep, self._half_written = self._half_written if keep_weights else NEW_MEMORY, ASLEEP
            if keep_weights:
                self._model.to("cpu")
            else:
                self._shapes = [parameter.shape for parameter in self._model.parameters()]
                for parameter in self._model.parameters():
                    parameter.data = parameter.data.new_empty(0)
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()  # else the allocator keeps it from the other processes of this device

    def wake_weights(self) -> None:
        """See `GenerationEngine.wake_weights`."""
        with self._gate.stopped():
            self._model.to(self._device)
            if self._shapes:
                for parameter, shape in zip(self._model.parameters(), self._shapes, strict=True):
                    parameter.data = parameter.data.new_empty(shape)
                self._shapes = []
            if self._half_written == ASLEEP:
                self._half_written = self._after_sleep

    def wake_cache(self) -> None:
        """Each generation makes its own."""

    def shutdown(self) -> None:
        """Nothing outlives this process."""


def _head_in_float32(model: Any) -> None:
    """The weight stays as it is: only the product is in float32, so that a weight transfer finds what it knows."""
    head = model.get_output_embeddings()

    def product(hidden: Tensor) -> Tensor:
        bias = None if head.bias is None else head.bias.float()
        return torch.nn.functional.linear(hidden.float(), head.weight.float(), bias)

    head.forward = product


def _warpers(sampling: Sampling) -> list[LogitsProcessor]:
    """Temperature, then top-k, then top-p: vLLM's order."""
    if sampling.temperature == 0:
        return []
    warpers: list[LogitsProcessor] = []
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


def _samples(rows: Sequence[Request], new_BT: Tensor, draw: SeededDraw, stops: Sequence[int]) -> list[Sample]:
    """Each row up to and with its first stop id; whatever follows is padding."""
    width = new_BT.shape[1]
    logprobs_BT = torch.stack(draw.logprobs, dim=1).cpu()
    is_stop_BT = torch.isin(new_BT, torch.tensor(stops, dtype=torch.int64))
    stopped_B = is_stop_BT.any(-1)
    first_B = is_stop_BT.to(torch.int8).argmax(-1)
    lengths = torch.where(stopped_B, first_B + 1, width).tolist()
    tokens, logprobs = new_BT.tolist(), logprobs_BT.tolist()
    return [
        Sample(request.index, tokens[b][:n], logprobs[b][:n], draw.versions[:n], truncated=not stopped)
        for b, (request, n, stopped) in enumerate(zip(rows, lengths, stopped_B.tolist(), strict=True))
    ]
