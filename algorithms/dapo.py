"""DAPO (2503.14476): GRPO with clip-higher, a mean over tokens, a soft penalty near the length limit, and dynamic
sampling: prompts whose samples all score the same are replaced by others.

overlong_buffer: by default a fifth of the length limit, as in the paper (4,096 of 20,480 tokens). aggregation: DAPO's
code averages over all tokens of the step (token_mean); its equation 8 over the tokens of each prompt (prompt_mean).
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from algorithms.functional import shaping
from algorithms.functional.aggregation import Mode
from algorithms.grpo import GRPO
from hybridflow.algorithm import AlgorithmContext, Verdict
from hybridflow.batch_ref import BatchRef


class DAPO(GRPO):
    class Config(GRPO.Config):
        """max_draws: how often a step may draw prompts; 1 is no dynamic sampling. overlong_buffer: tokens before the
        length limit in which the penalty grows to overlong_penalty; 0 is none, null a fifth of the limit."""

        old_logprobs: Literal["recompute", "rollout", "detach"] = "recompute"
        clip_high: float = Field(0.28, gt=0)
        aggregation: Mode = "token_mean"
        max_draws: int = Field(10, ge=1)
        overlong_buffer: int | None = Field(None, ge=0)
        overlong_penalty: float = Field(1.0, ge=0)

    @classmethod
    def max_draws(cls, config: Any) -> int:
        return config.max_draws

    @classmethod
    def problems_in(cls, config: Any, context: AlgorithmContext) -> list[str]:
        limit, found = context.max_response_tokens, config.overlong_buffer
        text = f"overlong_buffer: found {found}; allowed: at most {limit}, rollout.sampling.max_response_tokens"
        return [text] if found is not None and found > limit else []

    def accept(self, group: BatchRef) -> Verdict:
        scores = group.scalar("rewards")[~group.scalar("abstained").astype(bool)]
        return "keep" if len(scores) > 1 and scores.min() < scores.max() else "refill"

    def rewards(self, rows: BatchRef) -> Tensor:
        limit, buffer = self.context.max_response_tokens, self.config.overlong_buffer
        buffer = limit // 5 if buffer is None else buffer
        if not buffer:
            return super().rewards(rows)
        lengths_B = torch.from_numpy(rows.scalar("response_length"))
        return super().rewards(rows) + self.config.overlong_penalty * shaping.overlong(lengths_B, limit, buffer)
