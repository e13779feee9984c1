"""What two gloo ranks do for `test_offload.py`: training with memory given back between steps, and without.

Run as `python offload_ranks.py <rank> <port> <folder>`; the numbers go to `<folder>/result-<rank>.json`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from training_samples import TokenLoss, ragged_batch

from hybridflow.controller.coordinates import Coordinates, Shape
from workers.training.factory import build_engine
from workers.training.settings import EngineSettings

CASES = [("torch", 0, "float32"), ("torch", 0, "bfloat16")]
CASES += [("deepspeed", stage, "float32") for stage in range(4)] + [
    ("deepspeed", stage, "bfloat16") for stage in (1, 3)
]
BATCH = ragged_batch(7, seed=4)


def engine(rank: int, folder: Path, name: str, stage: int, dtype: str) -> Any:
    fields: dict[str, Any] = {"name": name, "dtype": dtype, "tokens_per_micro_batch": 20, "optimizer": {"lr": 1e-2}}
    if name == "deepspeed":
        fields |= {"zero_stage": stage}
    if stage == 3:
        fields["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    settings = EngineSettings.model_validate(fields)
    return build_engine(folder / "model", settings, Coordinates(rank, Shape(data=2)), "causal_lm", True)


def check(rank: int, folder: Path, *case: Any) -> dict[str, float]:
    """Three steps each, and a checkpoint loaded before the second; `away` are the bytes that were given back after it,
    by part."""
    plain, other = engine(rank, folder, *case), engine(rank, folder, *case)
    shard, away = BATCH.take(range(rank, 7, 2)), {}
    saved = folder / "-".join(map(str, case))
    saved.mkdir(exist_ok=True)
    for step in range(3):
        if step == 1:
            other.save(saved)
            torch.distributed.barrier()
            other.load(saved)
        plain.train([(shard, TokenLoss())])
        other.offload(["optimizer", "gradients"])
        scored = other.forward(shard, ("logprobs",), 1.0)["logprobs"].flat
        away = {part: stash.num_bytes for part, stash in other._stashes.items()}
        other.onload()
        other.train([(shard, TokenLoss())])
    assert len(scored)
    state, expected = other.state_dict(), plain.state_dict()
    moved = max(float((expected[name] - before).abs().max()) for name, before in initial(folder, case).items())
    same = all(torch.equal(state[name], expected[name]) for name in expected)
    return {"same": float(same), "moved": moved, **away}


def initial(folder: Path, case: Any) -> dict[str, torch.Tensor]:
    settings = EngineSettings.model_validate({"name": "torch", "dtype": case[2]})
    return dict(build_engine(folder / "model", settings, Coordinates(0, Shape()), "causal_lm", False).state_dict())


def main() -> None:
    rank, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    results = {}
    for case in CASES:
        print("check:", case, flush=True)
        results[" ".join(map(str, case))] = check(rank, folder, *case)
    (folder / f"result-{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
