"""The reward as a model: a scalar head on a language model, read at the last token of each response."""

from pathlib import Path

import torch

from hybridflow.batch import Batch
from hybridflow.batch_ref import BatchRef
from hybridflow.config.model_paths import VALUE_HEAD_FILE
from hybridflow.controller.dispatch import dispatch
from hybridflow.controller.worker import WorkerContext
from hybridflow.data.tokenizers import load_tokenizer
from hybridflow.errors import ConfigError
from workers.model_worker import ModelWorker
from workers.sample_record import SampleRecorder
from workers.training.settings import EngineSettings


class RewardModelWorker(ModelWorker, SampleRecorder):
    """Frozen: what an online run scores with. It reads the policy's token ids, so both share a tokenizer."""

    kind = "reward_model"
    trainable = False

    def __init__(self, context: WorkerContext, model_folder: str, settings: EngineSettings, tokenizer: str) -> None:
        given = [model_folder, *([settings.lora.init_from] if settings.lora and settings.lora.init_from else [])]
        if not self.trainable and not any((Path(folder) / VALUE_HEAD_FILE).is_file() for folder in given):
            raise ConfigError(
                f"{context.name}: found {model_folder!r}, which has no {VALUE_HEAD_FILE}: a new head scores every text "
                "0. Give the model/ folder of a run of algorithm=reward_model or process_reward_model"
            )
        super().__init__(context, model_folder, settings)
        self.tokenizer = load_tokenizer(tokenizer)

    @dispatch("3D_PROTO", needs=("tokens",))
    def score(self, batch: BatchRef) -> Batch:
        """Writes `rewards`, the score at each row's last token; `abstained` and `failed` (never), `failure` (empty)."""
        scores = self.engine.forward(self.fetch(batch, ("tokens",)), ("scores",), 1.0)["scores"]
        rewards = scores.flat[scores.offsets[1:] - 1] if len(scores.lengths) else scores.flat
        never = torch.zeros(len(rewards), dtype=torch.bool)
        return Batch({"rewards": rewards, "abstained": never, "failed": never, "failure": [""] * len(rewards)})

    @dispatch("3D_PROTO", needs=("tokens",))
    def token_scores(self, batch: BatchRef) -> Batch:
        """Writes `scores`: of the text up to and with each token."""
        return Batch({"scores": self.engine.forward(self.fetch(batch, ("tokens",)), ("scores",), 1.0)["scores"]})


class RewardModelTrainer(RewardModelWorker):
    """A reward model under training."""

    trainable = True
