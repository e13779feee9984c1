"""GSPO (2507.18071): the ratio, its clip and the average belong to the sequence; bounds of the paper's section 5."""

from pydantic import Field

from algorithms.objectives import Objective, SequenceRatio
from algorithms.policy import NormalisedGroups, SequenceSettings


class GSPO(NormalisedGroups):
    class Config(SequenceSettings):
        clip_low: float = Field(3e-4, gt=0)
        clip_high: float = Field(4e-4, gt=0)

        def objective(self) -> Objective:
            return SequenceRatio(self.clip_low, self.clip_high)
