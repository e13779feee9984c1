"""AWR (1910.00177): log-likelihood weighted by exp(advantage / beta), capped; the loss of DigiRL's offline-to-online
recipe. The paper's advantage is a return minus a learned value; here the baseline is the group's mean score."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from algorithms.functional import advantages
from algorithms.objectives import AdvantageWeighted, Objective
from algorithms.policy import PolicyGradient, PolicySettings, group_ids
from hybridflow.batch_ref import BatchRef


class AWR(PolicyGradient):
    class Config(PolicySettings):
        """weight_max: 20 in the authors' code. beta: 1 there, of advantages that it standardises; ours are not, and 0.5
        is our choice for scores of 0 and 1."""

        old_logprobs: Literal["recompute", "rollout", "detach"] = "rollout"
        beta: float = Field(0.5, gt=0)
        weight_max: float = Field(20.0, gt=0)

        def objective(self) -> Objective:
            return AdvantageWeighted(self.beta, self.weight_max)

    def advantages(self, rewards_B: Tensor, rows: BatchRef) -> Tensor:
        return advantages.dr_grpo(rewards_B, group_ids(rows))
