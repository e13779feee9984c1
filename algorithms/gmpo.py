"""GMPO (2507.20673): the geometric mean of a sequence's token ratios, each clipped in log space to (-0.4, 0.4)."""

from pydantic import Field

from algorithms.objectives import GeometricMeanRatio, Objective
from algorithms.policy import NormalisedGroups, SequenceSettings


class GMPO(NormalisedGroups):
    class Config(SequenceSettings):
        clip_low: float = Field(0.4, gt=0)
        clip_high: float = Field(0.4, gt=0)

        def objective(self) -> Objective:
            return GeometricMeanRatio(self.clip_low, self.clip_high)
