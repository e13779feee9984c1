"""What gloo ranks do for `test_layout_reader.py`: their layouts and storages beside their full weights, to files.

Run as `python layout_ranks.py <rank> <tensor> <data> <port> <folder>` with this folder and the project on PYTHONPATH.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from training_ranks import SHARDED
from training_samples import TokenLoss, ValueLoss, ragged_batch

from hybridflow.controller.coordinates import Coordinates, Shape
from workers.training.factory import build_engine
from workers.training.settings import EngineSettings

BATCH = ragged_batch(6, seed=5)
READ = """
import hashlib, json, mmap, os, sys
for pid, fd, start, stop in json.loads(sys.argv[1]):
    with open(f"/proc/{pid}/fd/{fd}", "rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            print(hashlib.sha256(memory[start:stop]).hexdigest())
"""
"""Another process: prints a checksum of bytes [start, stop) of each shared storage."""


def cases(tensor: int, data: int) -> Iterator[tuple[str, str, int | None, dict[str, Any], str]]:
    """(name, model, ZeRO stage or None for the torch engine, settings, kind)."""
    for stage in (None, 0, 1, 2, 3) if tensor == 1 else (0, 1, 2, 3):
        for model in ("qwen2", "llama"):
            yield f"{model}-{stage}", model, stage, {}, "causal_lm"
    yield "critic-3", "qwen2", 3, {}, "critic"
    if tensor == 1:
        yield "bfloat16-1", "llama", 1, {"dtype": "bfloat16"}, "causal_lm"
        yield "bfloat16-3", "qwen2", 3, {"dtype": "bfloat16"}, "causal_lm"
        yield "persistent-3", "qwen2", 3, {"deepspeed": {}}, "causal_lm"
        for stage in (None, 2, 3):
            yield f"lora-{stage}", "qwen2", stage, {"lora": {"rank": 3}}, "causal_lm"


def shared_stages(tensor: int, data: int) -> tuple[int | None, ...]:
    """Of the engines whose weights go into shared memory."""
    return (None, 0, 1, 2, 3) if (tensor, data) == (1, 2) else ()


class Ranks:
    def __init__(self, rank: int, shape: Shape, folder: Path) -> None:
        self.at, self.folder = Coordinates(rank, shape), folder

    def engine(self, model: str, stage: int | None, changes: dict[str, Any], kind: str = "causal_lm") -> Any:
        fields = {"max_grad_norm": 0.5, "optimizer": {"lr": 1e-2, "eps": 1e-5}, "tokens_per_micro_batch": 20}
        fields |= {"name": "torch"} if stage is None else {"zero_stage": stage}
        fields |= {"deepspeed": SHARDED} if stage == 3 else {}
        settings = EngineSettings.model_validate({**fields, **changes})
        return build_engine(self.folder / model, settings, self.at, kind, True)  # type: ignore[arg-type]

    def train(self, engine: Any, kind: str = "causal_lm") -> None:
        """All rows on the last data rank."""
        batch = BATCH if self.at.data == self.at.shape.data - 1 else BATCH.take([])
        engine.train([(batch, ValueLoss() if kind == "critic" else TokenLoss())])

    def write(self, name: str, model: str, stage: int | None, changes: dict[str, Any], kind: str) -> None:
        """The storages are taken before training, and the same ones written after it."""
        engine = self.engine(model, stage, changes, kind)
        layout, storages = engine.layout(), engine.storages()
        memory = {name: tensor.data_ptr() for name, tensor in storages.items()}
        for _ in range(2):
            self.train(engine, kind)
        again = engine.storages()
        assert {name: tensor.data_ptr() for name, tensor in again.items()} == memory, "the tensors moved"
        assert all(torch.equal(again[name], storages[name]) for name in storages), "the tensors were not live"
        state = {key: tensor.clone() for key, tensor in engine.whole(engine.scorer.live).items()}
        file = self.folder / f"{name}-{self.at.shape.tensor}x{self.at.shape.data}-{self.at.rank}.pt"
        torch.save({"layout": layout, "storages": storages, "state": state}, file)

    def share(self, model: str, stage: int | None) -> dict[str, float]:
        """Two engines train alike; the weights of one go into shared memory after the first step."""
        through, shared = self.engine(model, stage, {}), self.engine(model, stage, {})
        for engine in (through, shared):
            self.train(engine)
        storages = shared.storages()
        for tensor in storages.values():
            tensor.untyped_storage().share_memory_()
        for _ in range(3):
            for engine in (through, shared):
                self.train(engine)
        ours, theirs = shared.state_dict(), through.state_dict()
        seen = self.seen_by_another_process(storages)
        at_start = self.engine(model, stage, {}).storages()
        return {
            "equal": float(all(torch.equal(ours[name], theirs[name]) for name in theirs)),
            "seen": float(seen == checksums(storages)),
            "moved": float(seen != checksums(at_start)),
        }

    def seen_by_another_process(self, storages: dict[str, torch.Tensor]) -> list[str]:
        places = []
        for tensor in storages.values():
            assert tensor.is_shared()
            fd, _ = tensor.untyped_storage()._share_fd_cpu_()
            start = tensor.storage_offset() * tensor.element_size()
            places.append((os.getpid(), fd, start, start + tensor.numel() * tensor.element_size()))
        command = [sys.executable, "-c", READ, json.dumps(places)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def checksums(storages: dict[str, torch.Tensor]) -> list[str]:
    import hashlib

    return [hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in storages.values()]


def main() -> None:
    rank, tensor, data = (int(argument) for argument in sys.argv[1:4])
    port, folder = sys.argv[4], Path(sys.argv[5])
    world = str(tensor * data)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=world, LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    ranks = Ranks(rank, Shape(tensor=tensor, data=data), folder)
    for case in cases(tensor, data):
        print("case:", case[0], flush=True)
        ranks.write(*case)
    found = {f"share-{stage}": ranks.share("qwen2", stage) for stage in shared_stages(tensor, data)}
    (folder / f"result-{tensor}x{data}-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
