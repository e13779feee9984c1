"""What every generation engine does."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import Field, model_validator

from hybridflow.resharding.incoming import Incoming
from hybridflow.resharding.layout import Layout
from hybridflow.resharding.proofs import ReadBack, Receipt
from hybridflow.resharding.published import Publication
from hybridflow.resharding.transport import Taken
from hybridflow.settings import Settings


class Interruption(Settings):
    """Ends a long thought by force (ScaleRL, 2510.13786, section 2): a response that has no stop id among its first
    `after_tokens` gets `text` appended, on which nothing is trained, and at most `answer_tokens` more."""

    after_tokens: int = Field(ge=1)
    text: str = Field(min_length=1)
    answer_tokens: int = Field(ge=1)


class Sampling(Settings):
    """How responses are drawn. Log-probs are those of the distribution sampled from (temperature applied).

    temperature: 0 takes the likeliest token (log-probs then at temperature 1). top_k: 0 keeps all tokens.
    max_response_tokens: sampled ones; a forced text is not counted. stop_ids: end a response, beside the model's own
    end ids.
    """

    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    max_response_tokens: int = Field(default=64, ge=1)
    stop_ids: tuple[int, ...] = ()
    interruption: Interruption | None = None

    @model_validator(mode="after")
    def _parts_make_the_whole(self) -> "Sampling":
        forced = self.interruption
        if forced is not None and forced.after_tokens + forced.answer_tokens != self.max_response_tokens:
            raise ValueError(
                f"interruption: found after_tokens={forced.after_tokens} and answer_tokens={forced.answer_tokens}; "
                f"together they must be max_response_tokens={self.max_response_tokens}"
            )
        return self


@dataclass(frozen=True)
class Request:
    """One sample to draw. `index` is the caller's; `group` ties the samples of one prompt. greedy: takes the likeliest
    token, as temperature 0 does, whatever the sampling says."""

    index: int
    group: int
    prompt: list[int]
    seed: int
    greedy: bool = False


@dataclass(frozen=True)
class Sample:
    """`tokens` are the response ids as sampled, a stop id included; `logprobs` and `versions` one for each.

    `truncated`: the response ended at the length limit or by `abort`, not at a stop id. `forced`: start and stop of the
    tokens that were put there instead of sampled (log-prob 0, version -1).
    """

    index: int
    tokens: list[int]
    logprobs: list[float]
    versions: list[int]
    truncated: bool
    forced: tuple[int, int] = (0, 0)


class GenerationEngine(Protocol):
    """max_tokens: the most tokens that a prompt and its response may have together."""

    @property
    def max_tokens(self) -> int: ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[Sample]]:
        """Finished groups, in the order in which they finish; within a group in request order."""
        ...

    def layout(self) -> Layout:
        """Which slices of which parameters (Hugging Face names, `lm_head.weight` included when tied) the engine's
        tensor ranks 0, 1, ... must be given; one storage a parameter and rank."""
        ...

    def visible_gpus(self) -> tuple[str, ...]:
        """UUIDs of the GPUs on which all of the engine's processes can read other processes' memory."""
        ...

    def together(self) -> Sequence[Sequence[str]]:
        """Parameters of which `receive` must get all or none."""
        ...

    def receive(
        self, version: int, incoming: Sequence[Incoming], parts: Iterable[Taken], probe: Sequence[int]
    ) -> Receipt:
        """Replace the weights that the plan names and drop caches: each tensor rank copies its own slices out of the
        publications, one parameter at a time.

        incoming: one a tensor rank, of a plan whose destination is this engine's `layout`; of some of its parameters
        (`Incoming.only`) once a transfer of all has succeeded. parts: where these are read, together once; each is let
        go before the next is asked for. The receipt has the log-probs of `probe[1:]` given their prefixes. Requests
        held by `pause` go on with the new weights: those tokens carry the new version. (vLLM computes their prefixes
        again; the Hugging Face engine's rows keep the keys and values that they have, so their later tokens are of a
        mixture of both policies.) Whatever fails, the engine refuses to generate until a transfer succeeds. While the
        cache is asleep `probe` must be empty, and the method of that name follows `wake_cache`."""
        ...

    def probe(self, tokens: Sequence[int]) -> list[float]:
        """Log-probs of `tokens[1:]` given their prefixes, under the weights as they are."""
        ...

    def read_back(self, incoming: Sequence[Incoming], publications: Sequence[Publication]) -> ReadBack:
        """Where the weights that the engine computes with are not, bit for bit, those of the publications."""
        ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def abort(self) -> None:
        """End every running request with the tokens it has."""
        ...

    def sleep(self, keep_weights: bool = False) -> None:
        """Give the device's memory back, weights and caches, when nothing runs. The weights are gone, since others are
        about to come, and the engine refuses to generate until it received those; or a copy of them stays in the host's
        memory. Memory that an engine cannot give back (vLLM's on a CPU) it keeps."""
        ...

    def wake_weights(self) -> None:
        """Take memory for the weights, so that they can be received; the caches sleep on."""
        ...

    def wake_cache(self) -> None:
        """Take memory for the caches: the engine is awake. The weights must be awake already."""
        ...

    def shutdown(self) -> None: ...
