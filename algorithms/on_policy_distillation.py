"""On-policy distillation (Thinking Machines Lab 2025; GKD, 2306.13649, with beta = 1 and samples of the student alone):
each token that the student samples has the advantage log p_teacher - log p_student, minus one sample of the reverse KL.

Nothing is learnt from the reward, which measures the student in the record and in validation. Both models are read at
the sampling temperature.
"""

from typing import Any, Literal

import numpy as np
from pydantic import Field

from algorithms.distilling import TEACHER_LOGPROBS, TeacherAdvantages
from algorithms.policy import OnlinePolicy, RatioSettings
from algorithms.token_advantages import Moments
from hybridflow.algorithm import joined
from hybridflow.batch_ref import BatchRef
from hybridflow.metrics import Metric, Metrics
from hybridflow.roles import Roles


class OnPolicyDistillation(OnlinePolicy):
    class Config(RatioSettings):
        """samples_per_prompt: no baseline needs more than one."""

        samples_per_prompt: int = Field(1, ge=1)
        old_logprobs: Literal["recompute", "rollout", "detach"] = "rollout"

    @classmethod
    def required_roles(cls, config: Any) -> tuple[str, ...]:
        return (*super().required_roles(config), "teacher")

    def experience(self, rollouts: BatchRef, roles: Roles) -> BatchRef:
        def teacher(rows: BatchRef) -> Any:
            return roles.teacher.logprobs(rows, temperature=self.context.temperature, column=TEACHER_LOGPROBS)

        all_rows = rollouts.with_scalars(abstained=np.zeros(rollouts.num_rows, dtype=bool))
        rows = self.with_logprobs(all_rows, roles, teacher)
        return joined(rows, roles.actor.compute(TeacherAdvantages(self.config.sampled_column), rows))

    def update(self, experience: BatchRef, roles: Roles, step: int) -> Metrics:
        sums = roles.actor.reduce(Moments("advantages"), experience).result()
        divergence = Metric(-sums["sum"], max(sums["count"], 1.0))
        return super().update(experience, roles, step) | {"distillation/reverse_kl": divergence}
