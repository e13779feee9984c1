"""A person's own algorithm and settings, as a plug-in would bring them."""

from pydantic import Field

from hybridflow.algorithm import Algorithm
from hybridflow.settings import Settings


class Toy(Algorithm):
    class Config(Settings):
        samples: int = Field(4, ge=1)
        epochs: int = 2

    @classmethod
    def samples_per_prompt(cls, config):
        return config.samples

    @classmethod
    def sequences_per_update(cls, config, prompts_per_step):
        return prompts_per_step

    @classmethod
    def problems(cls, config):
        return ["samples: 1 sample has no group baseline; at least 2"] if config.samples == 1 else []

    def update(self, experience, roles, step):
        return {}


class ToyEngine(Settings):
    name: str = "torch"
    lr: float = Field(1.0, gt=0)
    tokens_per_micro_batch: int = 100


class NotAnAlgorithm:
    pass


class Unfinished(Algorithm):
    """Has no `update`."""
