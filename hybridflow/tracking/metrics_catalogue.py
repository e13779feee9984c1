"""Every metric that a run logs: its unit, what it means, and the range in which a run is healthy.

`docs/metrics.md` is written from here: `python -m hybridflow.tracking.metrics_catalogue > docs/metrics.md`. A name that
is not described may be logged; a plug-in describes its own with `register`.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from hybridflow.errors import HybridFlowError


@dataclass(frozen=True)
class MetricSpec:
    """`name` may end in a glob (`timing_s/*`). `low` and `high` bound the healthy range; None where there is no bound.
    Outside it a run is not wrong, it is worth a look."""

    name: str
    unit: str
    meaning: str
    low: float | None = None
    high: float | None = None

    def healthy(self, value: float) -> bool:
        """False for NaN too."""
        above = self.low is None or value >= self.low
        below = self.high is None or value <= self.high
        return value == value and above and below

    @property
    def healthy_range(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        if self.low is not None:
            return f"at least {self.low:g}"
        return "any" if self.high is None else f"at most {self.high:g}"


_CATALOGUE: dict[str, MetricSpec] = {}


def register(spec: MetricSpec) -> MetricSpec:
    """Describe a metric. The same spec twice is harmless; another one under the name is an error."""
    known = _CATALOGUE.setdefault(spec.name, spec)
    if known != spec:
        raise HybridFlowError(f"metric {spec.name!r} is described already, with another meaning: {known.meaning}")
    return spec


def describe(name: str) -> MetricSpec | None:
    """The spec of exactly this name, else of the longest glob that it matches, else None."""
    if name in _CATALOGUE:
        return _CATALOGUE[name]
    globs = [spec for spec in _CATALOGUE.values() if "*" in spec.name and fnmatchcase(name, spec.name)]
    return max(globs, key=lambda spec: len(spec.name), default=None)


def catalogue() -> list[MetricSpec]:
    return list(_CATALOGUE.values())


def render() -> str:
    """`docs/metrics.md`: one table per prefix, in the order of the catalogue."""
    lines = [
        "# Metrics",
        "",
        "Written by `python -m hybridflow.tracking.metrics_catalogue > docs/metrics.md`; change the catalogue, not",
        "this page. A value outside its healthy range is not an error: it is where to look first.",
    ]
    prefix = ""
    for spec in catalogue():
        if spec.name.split("/")[0] != prefix:
            prefix = spec.name.split("/")[0]
            lines += ["", f"## {prefix}", "", "| metric | unit | healthy | meaning |", "|---|---|---|---|"]
        lines.append(f"| `{spec.name}` | {spec.unit} | {spec.healthy_range} | {spec.meaning} |")
    return "\n".join(lines) + "\n"


def _describe_all(*rows: tuple[str, str, float | None, float | None, str]) -> None:
    for name, unit, low, high, meaning in rows:
        register(MetricSpec(name, unit, meaning, low, high))


_describe_all(
    ("actor/loss", "loss", None, None, "what the optimizer minimised: policy loss plus KL and entropy terms"),
    ("actor/pg_loss", "loss", None, None, "policy-gradient part of the loss"),
    ("actor/ppo_kl", "nats", -0.02, 0.1, "mean of old minus new log-prob over trainable tokens: how far updates went"),
    ("actor/pg_clipfrac", "share", 0, 0.3, "trainable tokens whose ratio is clipped from above or below"),
    ("actor/entropy", "nats", 0.01, None, "mean entropy of the policy per token; near 0 it explores no more"),
    ("actor/nll", "nats", 0, None, "supervised loss: mean negative log-prob of a response token"),
    ("distillation/reverse_kl", "nats", -0.05, 5, "mean of student minus teacher log-prob of the student's tokens"),
    ("distillation/divergence", "nats", 0, 5, "mean divergence of student and teacher per token, as it is minimised"),
    ("actor/grad_norm", "norm", 1e-8, 10, "global gradient norm before clipping"),
    ("actor/lr", "1", 0, None, "learning rate of the last optimizer step"),
    ("actor/kl_loss", "nats", -0.1, 1, "estimated KL from the reference as it enters the loss"),
    ("actor/ratio_max", "1", 1, 10, "largest probability ratio of new to old over trainable tokens"),
    ("critic/vf_loss", "loss", 0, None, "value-function loss"),
    ("critic/vf_clipfrac", "share", 0, 0.5, "trainable tokens whose value was clipped"),
    (
        "critic/vf_explained_var",
        "share",
        0,
        1,
        "1 - Var(returns - values) / Var(returns); below 0 is worse than the mean",
    ),
    ("critic/vpred_mean", "reward", None, None, "mean predicted value over trainable tokens"),
    ("critic/loss", "loss", 0, None, "what the critic's optimizer minimised"),
    ("critic/grad_norm", "norm", 1e-8, 100, "global gradient norm before clipping"),
    ("critic/lr", "1", 0, None, "learning rate of the last optimizer step"),
    ("reward/mean", "reward", None, None, "mean score over samples that were judged"),
    ("reward/std", "reward", 1e-6, None, "standard deviation of the score; 0 leaves nothing to learn from"),
    ("reward/max", "reward", None, None, "largest score"),
    ("reward/min", "reward", None, None, "smallest score"),
    ("reward/abstained", "samples", 0, None, "samples without a score: declined or failed; they are outside the loss"),
    ("reward/failed", "samples", 0, 0.5, "samples that the reward raised, crashed or hung on, twice; see the samples"),
    ("reward/loss", "loss", 0, None, "of a reward model under training: what its optimizer minimised"),
    ("reward/grad_norm", "norm", 1e-8, 100, "global gradient norm before clipping"),
    ("reward/lr", "1", 0, None, "learning rate of the last optimizer step"),
    ("reward/step_accuracy", "share", 0.5, 1, "steps of solutions whose score has the sign of their label"),
    ("reward/step_score", "reward", None, None, "mean score at the ends of steps: the log-odds that a step is right"),
    (
        "preference/accuracy",
        "share",
        0.5,
        1,
        "pairs whose chosen response has the larger reward (a tie is half a pair)",
    ),
    ("preference/margin", "reward", 0, None, "mean reward of chosen minus rejected responses"),
    ("preference/chosen_reward", "reward", None, None, "mean reward of chosen responses; a policy's is implicit"),
    ("preference/rejected_reward", "reward", None, None, "mean reward of rejected responses; a policy's is implicit"),
    (
        "preference/chosen_logprob",
        "nats",
        None,
        0,
        "mean log-prob of chosen responses, or of their tokens (per-token losses)",
    ),
    ("preference/rejected_logprob", "nats", None, 0, "mean log-prob of rejected responses, or of their tokens"),
    (
        "preference/chosen_nll",
        "nats",
        0,
        None,
        "likelihood term of CPO and ORPO: negative log-prob of chosen responses",
    ),
    (
        "preference/kl_baseline",
        "nats",
        0,
        10,
        "KTO's z0: mean log-ratio of mismatched prompts and responses, at least 0",
    ),
    ("response_length/mean", "tokens", 1, None, "mean response length"),
    ("response_length/max", "tokens", 1, None, "longest response"),
    ("response_length/min", "tokens", 1, None, "shortest response"),
    ("response_length/clip_ratio", "share", 0, 0.2, "responses that ended at the length limit, not at a stop id"),
    ("response_length/interrupted_share", "share", 0, 0.2, "responses whose thought was ended by the forced text"),
    ("prompt_length/mean", "tokens", 1, None, "mean prompt length"),
    ("group/zero_variance_share", "share", 0, 0.8, "groups whose samples all have one reward: they carry no gradient"),
    ("group/accepted", "groups", 1, None, "groups that the algorithm took into the step"),
    ("group/rejected", "groups", 0, None, "groups that were sampled and not taken: dropped, or replaced by refills"),
    ("group/skipped_prompts", "prompts", 0, None, "prompts that the algorithm left out before sampling"),
    (
        "rollout/logratio_max",
        "nats",
        0,
        0.1,
        "largest |trainer minus engine log-prob| of sampled tokens; 1e-4 in float32",
    ),
    ("rollout/logratio_mean", "nats", -0.01, 0.01, "mean of trainer minus engine log-prob of sampled tokens"),
    ("val/accuracy", "share", 0, 1, "judged held-out prompts that are answered right, with validation's own sampling"),
    ("val/reward_mean", "reward", None, None, "mean score on held-out prompts that were judged"),
    ("val/abstained", "samples", 0, None, "held-out prompts without a score: they are outside accuracy and mean"),
    ("val/response_length", "tokens", 1, None, "mean response length on held-out prompts"),
    ("val/nll", "nats", 0, None, "mean negative log-prob of a held-out response's token"),
    (
        "val/preference_accuracy",
        "share",
        0.5,
        1,
        "held-out pairs (or labels) that the reward, a policy's implicit, gets right",
    ),
    ("val/preference_margin", "reward", 0, None, "mean reward of chosen minus rejected responses of held-out pairs"),
    ("val/preference_chosen_reward", "reward", None, None, "mean reward of chosen responses of held-out pairs"),
    ("val/preference_rejected_reward", "reward", None, None, "mean reward of rejected responses of held-out pairs"),
    ("val/step_accuracy", "share", 0.5, 1, "held-out steps whose score has the sign of their label"),
    ("correction/ratio_mean", "1", 0.9, 1.1, "mean ratio of the policy before the update to the one that sampled"),
    ("correction/ratio_max", "1", None, 10, "largest such ratio"),
    ("correction/cut_share", "share", 0, 0.05, "ratios beyond a bound of the correction"),
    ("correction/row_ratio_mean", "1", 0.9, 1.1, "mean over rows that `rejection` saw of old over rollout probability"),
    ("correction/row_ratio_max", "1", 0.5, 5, "largest of these"),
    (
        "correction/effective_samples",
        "samples",
        1,
        None,
        "what the correction leaves: tokens, or sequences, of equal weight",
    ),
    ("correction/rejected_share", "share", 0, 0.05, "samples that were rejected as too far from the policy"),
    ("cost/mean", "cost", None, None, "mean cost of a response (safe_rlhf); is to come below cost_limit"),
    ("cost/multiplier", "1", 1e-3, None, "lambda, the price of cost in reward (safe_rlhf)"),
    ("cost_critic/*", "as critic", None, None, "of the critic of the costs (safe_rlhf): as critic/ of the other"),
    ("kl/reward_kl", "nats", -1, 100, "mean KL estimate of a response from the reference, as the reward pays for it"),
    ("kl/coefficient", "1", 0, None, "coefficient of the KL penalty in the reward; moves when it is adaptive"),
    ("timing_s/step", "s", 0, None, "the whole step"),
    ("timing_s/generate", "s", 0, None, "drawing the responses"),
    ("timing_s/reward", "s", 0, None, "scoring the samples"),
    ("timing_s/experience", "s", 0, None, "all between scores and updates: log-probs, values, advantages"),
    ("timing_s/update", "s", 0, None, "the optimizer steps of all trained roles"),
    ("timing_s/sync", "s", 0, None, "carrying the weights to the rollout engines, proofs included"),
    ("timing_s/validate", "s", 0, None, "sampling and scoring the held-out prompts; beside the val/ metrics"),
    ("timing_s/checkpoint", "s", 0, None, "writing the last checkpoint; logged with the step after it"),
    ("timing_s/actor_update", "s", 0, None, "the actor's optimizer steps"),
    ("timing_s/actor_logprobs", "s", 0, None, "log-probs under the policy before the update"),
    ("timing_s/actor_offer", "s", 0, None, "making the weights readable for the rollout engines"),
    ("timing_s/actor_prove", "s", 0, None, "checksums of what is sent, and the probe's log-probs"),
    ("timing_s/critic_update", "s", 0, None, "the critic's optimizer steps"),
    ("timing_s/critic_values", "s", 0, None, "the critic's values"),
    ("timing_s/reference_logprobs", "s", 0, None, "log-probs under the reference"),
    ("timing_s/reward_score", "s", 0, None, "the reward function itself"),
    ("timing_s/rollout_generate", "s", 0, None, "drawing the responses, in an engine"),
    ("timing_s/rollout_receive", "s", 0, None, "taking the weights over, in an engine"),
    (
        "timing_s/*",
        "s",
        0,
        None,
        "summed over a step: the driver's span of this name or, with runtime=ray, the slowest rank's `<role>_<method>`",
    ),
    ("perf/throughput", "tokens/s/device", 1, None, "prompt and response tokens over step seconds and devices"),
    ("perf/tokens", "tokens", 1, None, "prompt and response tokens of the step"),
    ("perf/cpu_utilisation", "share", 0.6, 1, "ranks' CPU seconds over cores x wall seconds of the step"),
    ("sync/version", "version", 0, None, "policy version that every engine provably holds"),
    ("sync/bytes", "bytes", 1, None, "slices that the engines' ranks received, each once a rank; proven by checksums"),
    ("sync/probe_difference_max", "nats", 0, 0.1, "largest difference of probe log-probs, engine against trainer"),
)

if __name__ == "__main__":
    print(render(), end="")
