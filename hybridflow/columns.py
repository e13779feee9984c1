"""The registry of column names: dtype, shape, who writes a column and who reads it. Plug-ins register theirs.

The row contract: one `tokens` row a sample (prompt, then response). Every token-level column has the length of
`tokens`. `logprobs[t]` is that of `tokens[t]` given its prefix, and 0 at t = 0. `response_mask` marks trainable tokens
and may have several spans.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from hybridflow.errors import HybridFlowError, did_you_mean

Shape = Literal["token", "row", "object"]


@dataclass(frozen=True)
class ColumnSpec:
    """`shape`: token (ragged, as long as `tokens`), row (one value a row, known to the driver), object (pickled)."""

    name: str
    shape: Shape
    dtype: str
    writer: str
    meaning: str


_REGISTRY: dict[str, ColumnSpec] = {}


def register(spec: ColumnSpec) -> ColumnSpec:
    """Add a column name. Registering the same spec again is harmless; another spec under the name is an error."""
    known = _REGISTRY.setdefault(spec.name, spec)
    if known != spec:
        raise HybridFlowError(f"column {spec.name!r} is registered already with another meaning: {known}")
    return spec


def spec(name: str) -> ColumnSpec | None:
    return _REGISTRY.get(name)


def names() -> list[str]:
    return sorted(_REGISTRY)


def missing_column(name: str, where: str, present: Iterable[str]) -> HybridFlowError:
    """The error for a column that a call needs and the batch lacks: says which role writes it."""
    known = _REGISTRY.get(name)
    writer = (
        f"it is written by {known.writer}" if known else f"no such column is registered{did_you_mean(name, names())}"
    )
    return HybridFlowError(
        f"{where}: column {name!r} is missing; {writer}. Present: {', '.join(sorted(present)) or 'none'}"
    )


for _row in (
    ("prompt_tokens", "token", "int64", "data", "token ids of the prompt alone (requests only)"),
    ("tokens", "token", "int64", "rollout.generate or data", "prompt and response ids, as sampled"),
    ("response_mask", "token", "bool", "rollout.generate or data", "trainable tokens"),
    ("rollout_logprobs", "token", "float32", "rollout.generate", "log-prob under the sampling policy"),
    ("versions", "token", "int32", "rollout.generate", "policy version that sampled the token; -1 where none did"),
    ("old_logprobs", "token", "float32", "actor.logprobs", "log-prob under the policy before this update"),
    ("ref_logprobs", "token", "float32", "reference.logprobs", "log-prob under the reference"),
    ("values", "token", "float32", "critic.values", "V of the state before the token"),
    ("token_rewards", "token", "float32", "algorithm", "reward on each token, KL penalty included"),
    ("advantages", "token", "float32", "algorithm", "advantage of each token"),
    ("returns", "token", "float32", "algorithm", "regression target of the critic"),
    ("rewards", "row", "float32", "reward.score", "score of the whole sample"),
    ("kept", "row", "bool", "algorithm.experience", "near enough to the policy that is updated (rejection)"),
    ("stale_ratio", "row", "float64", "algorithm.experience", "mean ratio of old to rollout probability (rejection)"),
    ("baseline", "row", "float64", "algorithm.experience", "what the sample's score is compared with"),
    ("row_advantages", "row", "float64", "algorithm.experience", "advantage of the whole sample, before whitening"),
    ("position", "row", "int64", "data", "position of the prompt in its data source"),
    ("group", "row", "int64", "algorithm.requests", "samples of one prompt share it"),
    ("sample", "row", "int64", "algorithm.requests", "index of the sample within its group"),
    ("seed", "row", "int64", "algorithm.requests", "sampling seed: a function of run seed, epoch, position and sample"),
    ("greedy", "row", "bool", "algorithm.requests", "take the likeliest token at every position (optional)"),
    ("interrupted", "row", "bool", "rollout.generate", "the response's end was forced (rollout.sampling.interruption)"),
    ("prompt_length", "row", "int64", "data", "tokens of the prompt"),
    ("response_length", "row", "int64", "rollout.generate", "trainable tokens of the response"),
    ("num_tokens", "row", "int64", "rollout.generate or data", "length of `tokens`"),
    ("truncated", "row", "bool", "rollout.generate", "the response ended at the length limit, not at a stop id"),
    (
        "loss_weight",
        "row",
        "float64",
        "algorithm.update",
        "weight of each trainable token of the row in the step's loss",
    ),
    (
        "abstained",
        "row",
        "bool",
        "reward.score",
        "the reward declined to judge, or failed; the row is outside baselines and losses",
    ),
    ("failed", "row", "bool", "reward.score", "the reward raised, crashed or hung on the row, twice"),
    ("failure", "object", "str", "reward.score", "what the reward raised on the row; empty where it did not fail"),
    ("policy_logprobs", "token", "float32", "actor.logprobs", "log-prob under the policy as it is now"),
    (
        "sequence_logprob",
        "row",
        "float64",
        "algorithm",
        "sum or mean of policy_logprobs over the row's trainable tokens",
    ),
    ("ref_sequence_logprob", "row", "float64", "algorithm", "the same of ref_logprobs"),
    ("scores", "token", "float32", "reward.token_scores", "reward model's score of the text up to and with the token"),
    ("step_labels", "token", "float32", "data", "label of the step that ends with the token; 0 elsewhere"),
    ("atom", "row", "int64", "data or algorithm", "rows that share it are never split over mini-batches or ranks"),
    ("chosen", "row", "bool", "data or algorithm", "the preferred one of the two rows of a pair (atom)"),
    ("margin", "row", "float64", "data", "how much better the chosen response of the row's pair is"),
    ("desirable", "row", "bool", "data", "label of a response, or of the example that a mismatched row belongs to"),
    ("mismatched", "row", "bool", "data", "the row has another prompt's response: of KTO's baseline alone"),
    ("prompt", "object", "str", "data", "the prompt as text"),
    ("answer", "object", "object", "data", "what the reward compares with"),
):
    register(ColumnSpec(*_row))  # type: ignore[arg-type]
