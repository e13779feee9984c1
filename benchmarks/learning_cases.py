"""What benchmarks/learning.py runs: every algorithm, and what it is told beside its own YAML.

All online algorithms draw 512 samples a step (ReMax's greedy half among them; DAPO and ScaleRL draw until 512 are kept)
and share the actor's learning rate, so that their curves may be laid over each other; iterative_dpo, with four steps a
batch, falls at that rate before it rises, and has a quarter of it. Beside that the settings are those of the YAMLs,
and otherwise what arithmetic_grpo was given. The three that gained least in 120 steps have more.
"""

from dataclasses import dataclass
from pathlib import Path

SHARED = ("experiment=arithmetic_online",)
TWO_STEPS = ("algorithm.mini_batches=2", "algorithm.old_logprobs=rollout")
HIGHER = "algorithm.clip_high=0.28"
DIVIDED = ("algorithm.samples_per_prompt=8", "trainer.prompts_per_step=64")


@dataclass(frozen=True)
class Case:
    """overrides: of the run; steps: how many. start: the seed's run whose model it starts from. schedule: optimizer
    steps over which the actor's rate falls; 0 leaves it to the configuration. metric: what it is judged by. teacher:
    the seed's GRPO model is one. bar: the least gain."""

    name: str
    overrides: tuple[str, ...]
    steps: int = 120
    start: str = "sft"
    schedule: int = 240
    metric: str = "val/accuracy"
    teacher: bool = False
    bar: float = 0.10


def online(name: str, *overrides: str, steps: int = 120) -> Case:
    return Case(name, (*SHARED, f"algorithm={name}", *overrides), steps)


ONLINE = (
    Case("grpo", ("experiment=arithmetic_grpo",), 300, schedule=600, bar=0.30),
    Case("ppo", ("experiment=arithmetic_ppo",), 150, schedule=300, bar=0.30),
    Case("ppo_ptx", ("experiment=arithmetic_ppo_ptx",), 150),
    Case("safe_rlhf", ("experiment=arithmetic_safe_rlhf",)),
    online("dr_grpo", *DIVIDED, *TWO_STEPS, HIGHER),
    online("rloo", "algorithm.samples_per_prompt=4", "trainer.prompts_per_step=128", "algorithm.old_logprobs=detach"),
    online("reinforce_pp", "trainer.prompts_per_step=512", *TWO_STEPS, HIGHER),
    online("reinforce_pp_baseline", *DIVIDED, *TWO_STEPS, HIGHER),
    online("remax", "trainer.prompts_per_step=256", "algorithm.old_logprobs=detach", steps=200),
    online("opo", *DIVIDED),
    online("gpg", *DIVIDED),
    online("dapo", *DIVIDED, *TWO_STEPS),
    online("gspo", *DIVIDED, *TWO_STEPS),
    online("gmpo", *DIVIDED, *TWO_STEPS),
    online("sapo", *DIVIDED, *TWO_STEPS),
    online("cispo", *DIVIDED, *TWO_STEPS),
    online("scale_rl", "algorithm.samples_per_prompt=16", "trainer.prompts_per_step=32", *TWO_STEPS, steps=200),
    online("awr", *DIVIDED, "algorithm.mini_batches=2"),
    online("online_dpo", "trainer.prompts_per_step=256"),
    online("iterative_dpo", *DIVIDED, "actor.engine.optimizer.lr=5e-5"),
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


def policy(name: str, rate: float = 2e-4) -> Case:
    given = (f"algorithm={name}", "model=pretrained", "trainer.prompts_per_step=128", f"engine.optimizer.lr={rate}")
    return Case(name, given, 200, schedule=0, metric="val/preference_accuracy")


def reward(name: str, metric: str, steps: int) -> Case:
    """To judge a sum at its last digit is a skill of its own, so it starts from the model that adds best."""
    given = (f"algorithm={name}", "model=pretrained", "trainer.prompts_per_step=128", "engine.optimizer.lr=3e-4")
    return Case(name, given, steps, "grpo", 0, metric)


OFFLINE = (
    *(policy(name) for name in ("dpo", "simpo", "cpo", "orpo")),
    policy("kto", 3e-5),
    reward("reward_model", "val/preference_accuracy", 2000),
    reward("process_reward_model", "val/step_accuracy", 800),
)
