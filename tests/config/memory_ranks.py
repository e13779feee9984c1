"""What two gloo ranks do for `test_memory.py`: DeepSpeed engines of every ZeRO stage, and the bytes they really hold.

Run as `python memory_ranks.py <rank> <port> <folder>`; the numbers go to `<folder>/bytes-<rank>.json`.
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from hybridflow.batch import Batch, Ragged
from hybridflow.controller.coordinates import Coordinates, Shape
from hybridflow.loss import LossInputs
from workers.training.factory import build_engine
from workers.training.settings import EngineSettings

CASES = {
    "0": {"zero_stage": 0},
    "1": {"zero_stage": 1},
    "2": {"zero_stage": 2},
    "3": {"zero_stage": 3},
    "3 sharded": {
        "zero_stage": 3,
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    },
    "1 bfloat16": {"zero_stage": 1, "dtype": "bfloat16"},
    "3 bfloat16": {"zero_stage": 3, "dtype": "bfloat16"},
    "0 lora": {"zero_stage": 0, "lora": {"rank": 2}},
    "1 lora": {"zero_stage": 1, "lora": {"rank": 2}},
    "3 lora": {"zero_stage": 3, "lora": {"rank": 2}},
    "3 lora sharded": {
        "zero_stage": 3,
        "lora": {"rank": 2},
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    },
}


class Surprise:
    outputs: tuple[Any, ...] = ("logprobs",)
    columns: tuple[str, ...] = ()
    atom = "row"
    temperature = 1.0

    def __call__(self, inputs: LossInputs) -> tuple[torch.Tensor, dict[str, Any]]:
        return -inputs.outputs["logprobs"], {}


def batch() -> Batch:
    rows, mask = [[1, 2, 3, 4], [5, 6, 7, 8]], [[False, True, True, True]] * 2
    return Batch(
        {
            "tokens": Ragged.from_rows(rows, torch.int64),
            "response_mask": Ragged.from_rows(mask, torch.bool),
            "loss_weight": torch.full((2,), 1 / 12),
        }
    )


def unique_bytes(tensors: Iterable[torch.Tensor], known: Iterable[torch.Tensor] = ()) -> int:
    """Of the memory behind the tensors, each once, but for what lies behind `known`."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in known}
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def held(settings: EngineSettings, folder: Path, coordinates: Coordinates) -> dict[str, int]:
    """After one step, and after the weights have been offered to engines."""
    engine: Any = build_engine(folder, settings, coordinates, "causal_lm", trainable=True)
    engine.train([(batch(), Surprise())])
    parameters = list(engine.scorer.parameters())
    weights = [p.data for p in parameters] + [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    weights += engine.storages().values()
    outer = engine.optimizer
    inner = getattr(outer, "optimizer", outer)
    masters = list(getattr(outer, "fp32_partitioned_groups_flat", []))
    masters += [p for group in inner.param_groups for p in group["params"]]
    states = [value for state in inner.state.values() for value in state.values() if value.numel() > 1]
    return {"weights": unique_bytes(weights), "optimizer": unique_bytes([*masters, *states], weights)}


def main() -> None:
    rank, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    found = {}
    for name, fields in CASES.items():
        print("case:", name, flush=True)
        settings = EngineSettings.model_validate({"name": "deepspeed", **fields})
        found[name] = held(settings, folder / "model", Coordinates(rank, Shape(data=2)))
    (folder / f"bytes-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
