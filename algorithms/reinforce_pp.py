"""REINFORCE++ (2501.03262): PPO's clipped loss without a critic or groups: returns-to-go of token rewards that pay for
the KL, whitened over the tokens of the whole step."""

from typing import Any

from pydantic import Field

from algorithms.policy import ClipSettings, OnlinePolicy
from algorithms.token_advantages import KLPenalty, ReturnsToGo, whitened
from hybridflow.algorithm import joined
from hybridflow.batch_ref import BatchRef
from hybridflow.roles import Roles


class ReinforcePP(OnlinePolicy):
    class Config(ClipSettings):
        samples_per_prompt: int = Field(1, ge=1)
        gamma: float = Field(1.0, gt=0, le=1)
        kl_reward_coef: float = Field(0.01, ge=0)

    @classmethod
    def uses_reference(cls, config: Any) -> bool:
        return bool(config.kl_loss_coef or config.kl_reward_coef)

    def experience(self, rollouts: BatchRef, roles: Roles) -> BatchRef:
        rows = self.with_logprobs(rollouts, roles)
        returns = ReturnsToGo(self.config.gamma, KLPenalty(self.config.kl_reward_coef, self.config.sampled_column))
        return whitened(joined(rows, roles.actor.compute(returns, rows)), roles.actor)
