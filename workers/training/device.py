"""The one place that knows whether this rank computes on a CPU or on a CUDA device, and how ranks find each other."""

import os

import torch
import torch.distributed

from hybridflow.controller.coordinates import Coordinates
from hybridflow.errors import HybridFlowError

# DeepSpeed picks its accelerator once, when it is first imported, and transformers may be who imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def training_device() -> torch.device:
    """The CUDA device of this rank (`LOCAL_RANK`, counted over visible devices), else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def join_process_group(coordinates: Coordinates, device: torch.device) -> None:
    """The ranks' default process group, from MASTER_ADDR and MASTER_PORT. A group that exists already is used."""
    if torch.distributed.is_initialized():
        found, wanted = torch.distributed.get_world_size(), coordinates.shape.num_ranks
        if found != wanted:
            raise HybridFlowError(f"training: this process is in a group of {found} ranks, the engine needs {wanted}")
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise HybridFlowError(f"training: {name} is not set; every rank of a group needs the same address and port")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(backend(device), rank=coordinates.rank, world_size=coordinates.shape.num_ranks)


def refuse_model_parallel(coordinates: Coordinates, engine: str, cuts_tensors: bool) -> None:
    shape = coordinates.shape
    if shape.pipeline > 1:
        raise HybridFlowError(
            f"engine={engine}: found pipeline={shape.pipeline}; no engine trains in stages: set it to 1"
        )
    if shape.tensor > 1 and not cuts_tensors:
        raise HybridFlowError(
            f"engine={engine}: found tensor={shape.tensor}; every rank of it holds whole weights. Set tensor=1, or "
            "engine=deepspeed"
        )
