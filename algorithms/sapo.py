"""SAPO (2511.20347): a soft gate in place of the clip, steeper for tokens of negative advantage."""

from typing import Literal

from pydantic import Field

from algorithms.objectives import Objective, SoftGate
from algorithms.policy import NormalisedGroups, PolicySettings


class SAPO(NormalisedGroups):
    class Config(PolicySettings):
        """aggregation: the paper defines the mean over sequences alone."""

        tau_positive: float = Field(1.0, gt=0)
        tau_negative: float = Field(1.05, gt=0)
        aggregation: Literal["sequence_mean_token_mean"] = "sequence_mean_token_mean"  # type: ignore[assignment]

        def objective(self) -> Objective:
            return SoftGate(self.tau_positive, self.tau_negative)
