"""PPO-ptx (InstructGPT, 2203.02155, equation 2): PPO whose policy steps add the log-likelihood of pretraining rows, so
that what the model knew before is not lost.

The rows come from a source of their own, `extra_data.ptx`, and each optimizer step of the actor is one step on both
sums. ptx_coef 27.8 is the paper's, of a mean over tokens of the negative log-likelihood; the paper draws 8 pretraining
rows for each episode.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from algorithms.losses import SupervisedLoss
from algorithms.ppo import PPO
from algorithms.weighting import trainable, weighted
from hybridflow.batch_ref import BatchRef
from hybridflow.controller.futures import Future
from hybridflow.data.settings import RowKind
from hybridflow.loss import Loss
from hybridflow.metrics import Metrics
from hybridflow.roles import Roles


class PPOPTX(PPO):
    class Config(PPO.Config):
        """ptx_rows: pretraining rows of each of the actor's optimizer steps."""

        ptx_coef: float = Field(27.8, gt=0)
        ptx_rows: int = Field(64, ge=1)

    @classmethod
    def extra_rows(cls, config: Any) -> Mapping[str, RowKind]:
        return {"ptx": "responses"}

    def actor_step(self, part: BatchRef, loss: Loss, roles: Roles) -> Future[Metrics]:
        return roles.actor.update_jointly(part, loss, self.pretraining_rows(), SupervisedLoss())

    def pretraining_rows(self) -> BatchRef:
        """The next ones, weighted: mean over their tokens, times the coefficient."""
        rows = trainable(self.context.data["ptx"].next(self.config.ptx_rows))
        rows = weighted(rows, "token_mean", self.context.max_response_tokens)
        return rows.with_scalars(loss_weight=self.config.ptx_coef * rows.scalar("loss_weight"))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"ptx": self.context.data["ptx"].state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.context.data["ptx"].load_state_dict(state["ptx"])
