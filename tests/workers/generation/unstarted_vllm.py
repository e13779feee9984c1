"""vLLM's own model classes and loaders as any tensor rank of any size sees them, without an engine: no process is
started and no memory taken, so ranks of four and mixtures of experts are read in milliseconds."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from hybridflow.resharding.layout import Layout, Parameter
from workers.generation.model_folder import weight_shapes
from workers.generation.slices import layout_of
from workers.generation.vllm_loaders import Load, boxes_of, record_loads, unloaded


def unstarted_layout(folder: Path, tensor: int) -> Layout:
    """What a live engine of this folder with so many tensor ranks would answer."""
    shapes = weight_shapes(folder)
    ranks = [boxes_of(unstarted_loads(folder, shapes, rank, tensor), shapes) for rank in range(tensor)]
    return layout_of([Parameter(name, shape) for name, shape in shapes.items()], ranks)


def unstarted_loads(folder: Path, shapes: Mapping[str, tuple[int, ...]], rank: int, tensor: int) -> list[Load]:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    arguments = EngineArgs(model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=64)
    config = arguments.create_engine_config()
    with _as_rank(rank, tensor), set_current_vllm_config(config):
        with torch.device("meta"):
            model = initialize_model(config)
        loads = record_loads(model, config.model_config, shapes, torch.float32)
        assert not list(unloaded(model, loads))
    return loads


@contextmanager
def _as_rank(rank: int, size: int) -> Iterator[None]:
    """vLLM's process groups, as far as building a model asks them."""
    from vllm.distributed import parallel_state

    groups = {"_TP": _group(rank, size), "_EP": _group(rank, size), "_PP": _group(0, 1), "_DP": _group(0, 1)}
    groups |= {"_PCP": _group(0, 1), "_DCP": _group(0, 1)}
    before = {name: getattr(parallel_state, name) for name in groups}
    try:
        for name, group in groups.items():
            setattr(parallel_state, name, group)
        yield
    finally:
        for name, group in before.items():
            setattr(parallel_state, name, group)


def _group(rank: int, size: int) -> Any:
    return SimpleNamespace(
        rank_in_group=rank,
        world_size=size,
        is_first_rank=rank == 0,
        is_last_rank=rank == size - 1,
        device_group=SimpleNamespace(size=lambda: size, rank=lambda: rank),
    )
