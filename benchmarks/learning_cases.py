"""What benchmarks/learning.py runs: every algorithm, and what it is told beside its own YAML.

All online algorithms draw 512 samples a step (ReMax's greedy half among them; DAPO and ScaleRL draw until 512 are kept)
and share the actor's learning rate, so that their curves may be laid over each other. None was tuned further: the
settings are the paper's where the YAML has them, and otherwise what arithmetic_grpo was given.
"""

from dataclasses import dataclass
from pathlib import Path

SHARED = ("experiment=arithmetic_online",)
TWO_STEPS = ("algorithm.mini_batches=2", "algorithm.old_logprobs=rollout")
HIGHER = "algorithm.clip_high=0.28"
DIVIDED = ("algorithm.samples_per_prompt=8", "trainer.prompts_per_step=64")


@dataclass(frozen=True)
class Case:
    """overrides: of the run; steps: how many. schedule: optimizer steps over which the actor's rate falls; 0 leaves it
    to the configuration. metric: what it is judged by. teacher: the seed's GRPO model is one. bar: the least gain."""

    name: str
    overrides: tuple[str, ...]
    steps: int = 120
    schedule: int = 240
    metric: str = "val/accuracy"
    teacher: bool = False
    bar: float = 0.10


def online(name: str, *overrides: str, algorithm: str | None = None) -> Case:
    return Case(name, (*SHARED, f"algorithm={algorithm or name}", *overrides))


ONLINE = (
    Case("grpo", ("experiment=arithmetic_grpo",), 300, 600, bar=0.30),
    Case("ppo", ("experiment=arithmetic_ppo",), 150, 300, bar=0.30),
    Case("ppo_ptx", ("experiment=arithmetic_ppo_ptx",)),
    Case("safe_rlhf", ("experiment=arithmetic_safe_rlhf",)),
    online("dr_grpo", *DIVIDED, *TWO_STEPS, HIGHER),
    online("rloo", "algorithm.samples_per_prompt=4", "trainer.prompts_per_step=128", "algorithm.old_logprobs=detach"),
    online("reinforce_pp", "trainer.prompts_per_step=512", *TWO_STEPS, HIGHER),
    online("reinforce_pp_baseline", *DIVIDED, *TWO_STEPS, HIGHER),
    online("remax", "trainer.prompts_per_step=256", "algorithm.old_logprobs=detach"),
    online("opo", *DIVIDED),
    online("gpg", *DIVIDED),
    online("dapo", *DIVIDED, *TWO_STEPS),
    online("gspo", *DIVIDED, *TWO_STEPS),
    online("gmpo", *DIVIDED, *TWO_STEPS),
    online("sapo", *DIVIDED, *TWO_STEPS),
    online("cispo", *DIVIDED, *TWO_STEPS),
    online("scale_rl", "algorithm.samples_per_prompt=16", "trainer.prompts_per_step=32", *TWO_STEPS),
    online("awr", *DIVIDED, "algorithm.mini_batches=2"),
    online("online_dpo", "trainer.prompts_per_step=256"),
    online("iterative_dpo", *DIVIDED),
    online("rejection_sampling", *DIVIDED, "algorithm.least_reward=0.5", "algorithm.mini_batches=2"),
    Case("on_policy_distillation", ("experiment=arithmetic_on_policy_distillation",), teacher=True),
    Case("gkd", ("experiment=arithmetic_gkd", "algorithm.samples_per_prompt=4"), teacher=True),
)

REWARDS = Path(__file__).with_name("control_rewards.py")
CONTROLS = (
    Case("right", ("experiment=arithmetic_grpo",)),
    Case("chance", ("experiment=arithmetic_grpo", f"reward.function={REWARDS}:chance")),
    Case("inverted", ("experiment=arithmetic_grpo", f"reward.function={REWARDS}:inverted")),
)
"""GRPO, and the reward alone differs."""


def offline(name: str, metric: str = "val/preference_accuracy") -> Case:
    given = (f"algorithm={name}", "model=pretrained", "trainer.prompts_per_step=128", "engine.optimizer.lr=5e-4")
    return Case(name, given, 200, 0, metric)


OFFLINE = (
    *(offline(name) for name in ("dpo", "kto", "simpo", "cpo", "orpo", "reward_model")),
    offline("process_reward_model", "val/step_accuracy"),
)
