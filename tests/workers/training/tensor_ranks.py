"""What two gloo ranks of one tensor group do for `test_tensor_parallel.py`: all checks in one pair of processes.

Run as `python tensor_ranks.py <rank> <port> <folder>` with this folder and the project on PYTHONPATH; the numbers go to
`<folder>/result-<rank>.json`.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from training_ranks import SHARDED, difference
from training_samples import TokenLoss, ValueLoss, ragged_batch

from hybridflow.batch import Ragged
from hybridflow.controller.coordinates import Coordinates, Shape
from hybridflow.errors import CheckpointError, HybridFlowError, NonFiniteError
from workers.training.factory import build_engine
from workers.training.settings import EngineSettings

BATCH = ragged_batch(7, seed=4)
OUTPUTS = {"causal_lm": ("logprobs", "entropies"), "critic": ("values",), "reward_model": ("scores",)}


class Checks:
    """Both ranks always have the same rows."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank, self.folder = rank, folder

    def engine(self, stage: int | None, model: str = "qwen2", kind: Any = "causal_lm", **changes: Any) -> Any:
        """Over two tensor ranks; with None, the torch engine alone."""
        trainable, shape = changes.pop("trainable", True), changes.pop("shape", Shape(tensor=2))
        fields = {"max_grad_norm": 0.5, "optimizer": {"lr": 1e-2, "eps": 1e-5}, "tokens_per_micro_batch": 20}
        if stage is None:
            fields |= {"name": "torch"}
        else:
            fields |= {"zero_stage": stage, "deepspeed": SHARDED if stage == 3 else {}}
        settings = EngineSettings.model_validate({**fields, **changes})
        at = Coordinates(0, Shape()) if stage is None else Coordinates(self.rank, shape)
        return build_engine(self.folder / model, settings, at, kind, trainable)

    def equals_one_rank(self, stage: int, model: str, kind: str = "causal_lm", **changes: Any) -> dict[str, float]:
        loss: Any = ValueLoss() if kind != "causal_lm" else TokenLoss()
        built, expected = self.engine(stage, model, kind, **changes), self.engine(None, model, kind)
        scored, wanted = (engine.forward(BATCH, OUTPUTS[kind], 0.8) for engine in (built, expected))
        forward = difference({k: v.flat for k, v in scored.items()}, {k: v.flat for k, v in wanted.items()})
        norms = []
        for _ in range(3):
            norms.append([engine.train([(BATCH, loss)])["grad_norm"].value for engine in (built, expected)])
        return {
            "forward": forward,
            "weights": difference(built.state_dict(), expected.state_dict()),
            "norm": max(abs(found / wanted - 1) for found, wanted in norms),
            "clipped": float(min(wanted for _, wanted in norms) > 0.5),
            "names": float(list(built.state_dict()) == list(expected.state_dict())),
        }

    def frozen(self, kind: str, dtype: str) -> dict[str, float]:
        built = self.engine(1, kind=kind, trainable=False, dtype=dtype)
        expected = self.engine(None, kind=kind, trainable=False, dtype=dtype)
        found, wanted = (engine.forward(BATCH, OUTPUTS[kind], 0.8) for engine in (built, expected))
        parameters = list(built.scorer.parameters())
        held = sum(parameter.numel() for parameter in parameters)
        built.save(self.folder)
        return {
            "forward": difference({k: v.flat for k, v in found.items()}, {k: v.flat for k, v in wanted.items()}),
            "share": held / sum(parameter.numel() for parameter in expected.scorer.parameters()),
            "trains": float(any(parameter.requires_grad for parameter in parameters)),
        }

    def not_finite(self, stage: int) -> dict[str, float]:
        built, untouched = self.engine(stage), self.engine(stage)
        advantages = BATCH.ragged("advantages")
        poison = Ragged(torch.full_like(advantages.flat, float("nan")), advantages.lengths)
        refused = 0.0
        for engine in (built, untouched):
            engine.train([(BATCH, TokenLoss())])
        try:
            built.train([(BATCH.union({"advantages": poison}), TokenLoss())])
        except NonFiniteError:
            refused = 1.0
        for engine in (built, untouched):
            engine.train([(BATCH, TokenLoss())])
        return {"refused": refused, "weights": difference(built.state_dict(), untouched.state_dict())}

    def resume(self, stage: int, dtype: str = "float32") -> dict[str, float]:
        through = self.engine(stage, dtype=dtype)
        through.train([(BATCH, TokenLoss())])
        folder = self.folder / f"checkpoint-{stage}-{dtype}"
        folder.mkdir(exist_ok=True)
        through.save(folder)
        torch.distributed.barrier()
        resumed = self.engine(stage, dtype=dtype)
        resumed.load(folder)
        for engine in (through, resumed):
            engine.train([(BATCH, TokenLoss())])
        saved = json.loads((folder / "deepspeed.json").read_text())
        torch.distributed.barrier()
        if self.rank == 0:
            (folder / "deepspeed.json").write_text(json.dumps({**saved, "tensor": 1}))
        torch.distributed.barrier()
        refused = 0.0
        try:
            resumed.load(folder)
        except CheckpointError:
            refused = 1.0
        weights = difference(through.state_dict(), resumed.state_dict())
        return {"weights": weights, "other shape refused": refused}

    def export(self, stage: int) -> dict[str, float]:
        from transformers import AutoModelForCausalLM

        built = self.engine(stage)
        built.train([(BATCH, TokenLoss())])
        folder = self.folder / f"export-{stage}"
        built.export(folder)
        torch.distributed.barrier()
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        return {"weights": difference(loaded, built.state_dict())}

    def second_size(self) -> dict[str, float]:
        try:
            self.engine(1, shape=Shape(data=2))
        except HybridFlowError as error:
            return {"refused": float("tensor=1 in a process that has tensor=2" in str(error))}
        return {"refused": 0.0}


def everything(checks: Checks) -> dict[str, Callable[[], dict[str, float]]]:
    todo: dict[str, Callable[[], dict[str, float]]] = {
        "equal llama 2": lambda: checks.equals_one_rank(2, "llama"),
        "equal qwen3 0": lambda: checks.equals_one_rank(0, "qwen3"),
        "equal qwen3 3": lambda: checks.equals_one_rank(3, "qwen3"),
        "equal checkpointing 1": lambda: checks.equals_one_rank(1, "qwen2", activation_checkpointing=True),
        "equal chunks 3": lambda: checks.equals_one_rank(3, "qwen2", logprob_chunk_tokens=3),
        "equal critic 0": lambda: checks.equals_one_rank(0, "qwen2", "critic"),
        "equal critic 3": lambda: checks.equals_one_rank(3, "qwen2", "critic"),
        "frozen float32": lambda: checks.frozen("causal_lm", "float32"),
        "frozen bfloat16": lambda: checks.frozen("causal_lm", "bfloat16"),
        "frozen reward": lambda: checks.frozen("reward_model", "float32"),
        "resume 1 bfloat16": lambda: checks.resume(1, "bfloat16"),
        "export 1": lambda: checks.export(1),
        "export 3": lambda: checks.export(3),
        "second size": checks.second_size,
    }
    for stage in range(4):
        todo[f"not finite {stage}"] = lambda stage=stage: checks.not_finite(stage)
        todo[f"resume {stage} float32"] = lambda stage=stage: checks.resume(stage)
    return todo


def main() -> None:
    rank, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    results = {}
    for name, check in everything(Checks(rank, folder)).items():
        print("check:", name, flush=True)
        results[name] = check()
        print(results[name], flush=True)
    (folder / f"result-{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
