"""ScaleRL (2510.13786): CISPO with a truncated ratio, prompt mean, scores divided by the batch's standard deviation,
groups without a signal dropped, and prompts that are solved left out for good.

Its other parts are settings elsewhere: logits in float32 below a half-precision model (`engine.float32_head` and
`rollout.float32_head`), and the forced end of an overlong thought (`rollout.sampling.interruption`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field
from torch import Tensor

from algorithms.functional import advantages
from algorithms.functional.aggregation import Mode
from algorithms.objectives import Objective, TruncatedWeight
from algorithms.policy import PolicyGradient, PolicySettings, group_ids
from hybridflow.algorithm import AlgorithmContext, Verdict
from hybridflow.batch_ref import BatchRef


class ScaleRL(PolicyGradient):
    class Config(PolicySettings):
        """solved_pass_rate: a prompt is left out for good once this share of its judged samples scored 1 or more.
        max_draws: how often a step may draw prompts to replace such; a group without a signal is not replaced."""

        samples_per_prompt: int = Field(16, ge=1)
        ratio_max: float = Field(5.0, gt=0)
        aggregation: Mode = "prompt_mean"
        solved_pass_rate: float = Field(0.9, gt=0, le=1)
        max_draws: int = Field(10, ge=1)

        def objective(self) -> Objective:
            return TruncatedWeight(self.ratio_max)

    def __init__(self, config: Any, context: AlgorithmContext) -> None:
        super().__init__(config, context)
        self.solved: set[int] = set()
        """Positions in the data: all of the pass-rate history that a later step reads."""

    @classmethod
    def max_draws(cls, config: Any) -> int:
        return config.max_draws

    def requests(self, prompts: BatchRef) -> BatchRef:
        fresh = ~np.isin(prompts.scalar("position"), list(self.solved))
        return super().requests(prompts.take(np.flatnonzero(fresh)))

    def accept(self, group: BatchRef) -> Verdict:
        scores = group.scalar("rewards")[~group.scalar("abstained").astype(bool)]
        if len(scores) and (scores >= 1).mean() >= self.config.solved_pass_rate:
            self.solved.add(int(group.scalar("position")[0]))
        return "keep" if len(scores) > 1 and scores.min() < scores.max() else "drop"

    def advantages(self, rewards_B: Tensor, rows: BatchRef) -> Tensor:
        return advantages.batch_std(rewards_B, group_ids(rows))

    def state_dict(self) -> dict[str, Any]:
        return {"solved": sorted(self.solved)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.solved = set(state["solved"])
