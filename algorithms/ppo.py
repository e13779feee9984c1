"""PPO (1707.06347) as RLHF runs it (1909.08593): critic, GAE, KL to the reference in the reward or in the loss."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from algorithms.functional import kl
from algorithms.losses import ValueLoss
from algorithms.policy import ClipSettings, OnlinePolicy
from algorithms.token_advantages import CriticAdvantages, KLPenalty, ValueMoments, whitened
from algorithms.weighting import over_steps, weighted_minibatches
from hybridflow.algorithm import AlgorithmContext, joined
from hybridflow.batch_ref import BatchRef
from hybridflow.controller.futures import Future
from hybridflow.loss import Loss
from hybridflow.metrics import Metric, Metrics
from hybridflow.roles import Roles
from hybridflow.settings import Settings


class AdaptiveKLSettings(Settings):
    """Steers kl_reward_coef to a target KL (1909.08593, section 2.2)."""

    target: float = Field(6.0, gt=0)
    horizon: int = Field(10_000, gt=0)


class PPO(OnlinePolicy):
    class Config(ClipSettings):
        """epochs 4, gamma 1 and lambda 0.95 as in 1909.08593; critic_warmup_steps hold the actor still."""

        epochs: int = Field(4, ge=1)
        samples_per_prompt: int = Field(1, ge=1)
        gamma: float = Field(1.0, gt=0, le=1)
        lam: float = Field(0.95, ge=0, le=1)
        value_clip: float | None = Field(0.2, gt=0)
        whiten_advantages: bool = True
        kl_reward_coef: float = Field(0.05, ge=0)
        adaptive_kl: AdaptiveKLSettings | None = None
        critic_warmup_steps: int = Field(0, ge=0)

    def __init__(self, config: Any, context: AlgorithmContext) -> None:
        super().__init__(config, context)
        self.kl_coef = config.kl_reward_coef

    @classmethod
    def required_roles(cls, config: Any) -> tuple[str, ...]:
        return (*super().required_roles(config), "critic")

    @classmethod
    def uses_reference(cls, config: Any) -> bool:
        return bool(config.kl_loss_coef or config.kl_reward_coef)

    @classmethod
    def problems(cls, config: Any) -> list[str]:
        idle = config.adaptive_kl is not None and not config.kl_reward_coef
        return config.problems() + (["adaptive_kl: steers kl_reward_coef, which is 0; set it above 0"] if idle else [])

    def experience(self, rollouts: BatchRef, roles: Roles) -> BatchRef:
        rows = self.with_logprobs(rollouts, roles, roles.critic.values)
        gae = CriticAdvantages(self.config.gamma, self.config.lam, self.penalty)
        rows = joined(rows, roles.critic.compute(gae, rows))
        return whitened(rows, roles.critic) if self.config.whiten_advantages else rows

    def update(self, experience: BatchRef, roles: Roles, step: int) -> Metrics:
        policy_loss, value_loss = self.config.loss(self.context.temperature), ValueLoss(self.config.value_clip)
        critic_steps, actor_steps = [], []
        for part in weighted_minibatches(experience, self.config, self.context, step):
            critic_steps.append(roles.critic.update(part, value_loss))
            if step >= self.config.critic_warmup_steps:
                actor_steps.append(self.actor_step(part, policy_loss, roles))
        metrics = over_steps([s.result() for s in critic_steps]) | over_steps([s.result() for s in actor_steps])
        return metrics | self.batch_metrics(experience, roles)

    def actor_step(self, part: BatchRef, loss: Loss, roles: Roles) -> Future[Metrics]:
        return roles.actor.update(part, loss)

    def state_dict(self) -> dict[str, Any]:
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kl_coef = float(state["kl_coef"])

    @property
    def penalty(self) -> KLPenalty:
        return KLPenalty(self.kl_coef, self.config.sampled_column)

    def batch_metrics(self, experience: BatchRef, roles: Roles) -> Metrics:
        """Explained variance of the critic, and the KL that the reward paid for (per sequence, 1909.08593)."""
        sums = roles.critic.reduce(ValueMoments(self.penalty), experience).result()
        metrics = super().batch_metrics(experience, roles) | {"critic/vf_explained_var": explained_variance(sums)}
        if self.kl_coef:
            observed = sums["kl"] / max(experience.num_rows, 1)
            metrics |= {"kl/reward_kl": Metric(observed), "kl/coefficient": Metric(self.kl_coef)}
            if self.config.adaptive_kl:
                controller = kl.AdaptiveKL(self.config.adaptive_kl.target, self.config.adaptive_kl.horizon)
                self.kl_coef = controller.next(self.kl_coef, observed, experience.num_rows)
        return metrics


def explained_variance(sums: Mapping[str, float]) -> Metric:
    """1 - Var(returns - values) / Var(returns), from `ValueMoments`."""
    count = max(sums["count"], 1.0)
    variance = sums["returns_sq"] / count - (sums["returns"] / count) ** 2
    residual = sums["error_sq"] / count - (sums["error"] / count) ** 2
    return Metric(1 - residual / variance if variance > 0 else 0.0)
