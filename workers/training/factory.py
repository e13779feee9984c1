"""Which engine a rank gets."""

from pathlib import Path

from hybridflow.controller.coordinates import Coordinates
from workers.training.base import TrainEngine
from workers.training.modeling import ModelKind
from workers.training.settings import EngineSettings
from workers.training.torch_engine import TorchEngine


def build_engine(
    folder: Path, settings: EngineSettings, coordinates: Coordinates, kind: ModelKind, trainable: bool
) -> TrainEngine:
    """The configured engine on a model folder. A frozen model (a reference) runs in the torch engine, which then holds
    no gradients and needs no collectives, unless its weights are to be divided over tensor ranks. Without trained
    weights to begin from, it needs no adapter either."""
    if not trainable and settings.lora is not None and settings.lora.init_from is None:
        settings = settings.model_copy(update={"lora": None})
    if settings.name == "torch" or (not trainable and coordinates.shape.tensor == 1):
        return TorchEngine(folder, settings, coordinates, kind, trainable)
    from workers.training.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(folder, settings, coordinates, kind, trainable)
