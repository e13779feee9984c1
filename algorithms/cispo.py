"""CISPO (2506.13585): the clipped ratio is a weight without gradient, so no token loses its gradient to a clip."""

from pydantic import Field

from algorithms.functional.aggregation import Mode
from algorithms.objectives import ClippedWeight, Objective
from algorithms.policy import NormalisedGroups, PolicySettings


class CISPO(NormalisedGroups):
    class Config(PolicySettings):
        """clip_low: 1 is no lower bound, as the paper runs it. clip_high: the paper tunes it and names no value; 4
        makes the bound 5, ScaleRL's."""

        clip_low: float = Field(1.0, gt=0)
        clip_high: float = Field(4.0, gt=0)
        aggregation: Mode = "token_mean"

        def objective(self) -> Objective:
            return ClippedWeight(self.clip_low, self.clip_high)
