"""DeepSpeed's ZeRO 0-3 and tensor parallelism against the torch engine: log-probs, gradients before the step and
weights after three steps.

    python benchmarks/zero_equivalence.py

Prints one line a case and ends with `ratio <worst error / its tolerance>`; exits with 1 when a tolerance is missed.
Float32, 1 and 2 ranks (gloo processes), 1 and 4 micro-batches a rank, SGD and AdamW (eps 1e-5), weight decay, active
clipping; then, with SGD and 4 micro-batches on 2 ranks, the losses of four algorithms: a clipped ratio (PPO), a ratio
of whole sequences (GSPO), pairs that are never split (DPO), and the whole vocabulary (GKD). Then tensor parallelism on
2 x 1 and 2 x 2 ranks (tensor x data), the token and the PPO loss. The reference is the torch engine on one rank with
all rows in one micro-batch.
"""

import argparse
import json
import math
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from algorithms.distilling import TEACHER_VOCABULARY, DivergenceLoss
from algorithms.functional.preference_losses import PairSettings
from algorithms.losses import PolicyLoss
from algorithms.objectives import ClippedRatio, SequenceRatio
from algorithms.preference_rows import PreferenceLoss
from hybridflow.batch import Batch, Ragged
from hybridflow.controller.coordinates import Coordinates, Shape
from hybridflow.loss import Atom, Loss, LossInputs, Output
from hybridflow.metrics import Metric
from workers.training.factory import build_engine
from workers.training.microbatch import training_micro_batches
from workers.training.modeling import initialise
from workers.training.settings import EngineSettings, OptimizerSettings

MODEL = {
    "model_type": "qwen2",
    "vocab_size": 82,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
OPTIMIZERS = {
    "sgd": OptimizerSettings(name="sgd", lr=0.1, weight_decay=0.01),
    "adamw": OptimizerSettings(name="adamw", lr=1e-3, eps=1e-5, weight_decay=0.01),
}
CLIP = {"sgd": None, "adamw": 0.5}
TOLERANCES = {"gradient": 1e-6, "sgd": 1e-6, "adamw": 1e-5, "logprobs": 5e-6}
NUM_ROWS = 24


@dataclass(frozen=True)
class TokenLoss:
    """-advantage * logprob - 0.01 * entropy."""

    outputs: tuple[Output, ...] = ("logprobs", "entropies")
    columns: tuple[str, ...] = ("advantages",)
    atom: Atom = "row"
    temperature: float = 1.0

    def __call__(self, inputs: LossInputs) -> tuple[torch.Tensor, dict[str, Metric]]:
        loss_BT = -inputs.columns["advantages"] * inputs.outputs["logprobs"] - 0.01 * inputs.outputs["entropies"]
        return loss_BT, {}


LOSSES: dict[str, Loss] = {
    "token": TokenLoss(),
    "ppo": PolicyLoss(1.0, ClippedRatio(0.2, 0.28)),
    "gspo": PolicyLoss(1.0, SequenceRatio(3e-2, 4e-2)),
    "dpo": PreferenceLoss("sigmoid", PairSettings(beta=0.5)),
    "gkd": DivergenceLoss(1.0, 0.5, listed=False),
}


def rows() -> Batch:
    """Ragged rows of 4 to 24 tokens, adjacent twos a pair; every weight is 1 / (all trainable tokens). Old log-probs
    are near those of the model, so that some ratios are clipped."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 25, (NUM_ROWS,), generator=generator)
    total = int(lengths.sum())
    mask = torch.rand(total, generator=generator) < 0.7
    mask[torch.nn.functional.pad(lengths.cumsum(0), (1, 0))[:-1]] = False
    return Batch(
        {
            "tokens": Ragged(torch.randint(0, 82, (total,), generator=generator), lengths),
            "response_mask": Ragged(mask, lengths),
            "loss_weight": torch.full((NUM_ROWS,), 1 / int(mask.sum()), dtype=torch.float64),
            "advantages": Ragged(torch.randn(total, generator=generator), lengths),
            **{name: Ragged(_near_uniform(total, generator), lengths) for name in ("old_logprobs", "ref_logprobs")},
            "rollout_logprobs": Ragged(_near_uniform(total, generator), lengths),
            TEACHER_VOCABULARY: Ragged(torch.randn(total, 82, generator=generator).log_softmax(-1), lengths),
            "atom": torch.arange(NUM_ROWS) // 2,
            "chosen": torch.arange(NUM_ROWS) % 2 == 0,
        }
    )


def _near_uniform(count: int, generator: torch.Generator) -> torch.Tensor:
    return -math.log(82) + 0.3 * torch.randn(count, generator=generator)


def shard_rows(num_ranks: int) -> list[list[int]]:
    """Pairs in turn."""
    pairs = [range(rank, NUM_ROWS // 2, num_ranks) for rank in range(num_ranks)]
    return [[2 * pair + second for pair in own for second in (0, 1)] for own in pairs]


def budget(num_ranks: int, accumulation: int, loss: Loss) -> int:
    """The smallest token budget that gives every rank exactly that many micro-batches."""
    shards = [rows().take(shard) for shard in shard_rows(num_ranks)]
    for tokens in range(24, 2000):
        if all(len(training_micro_batches(shard, loss, tokens)) == accumulation for shard in shards):
            return tokens
    raise AssertionError(f"no token budget gives {accumulation} micro-batches on {num_ranks} ranks")


def settings(engine: str, optimizer: str, tokens: int, stage: int = 0) -> EngineSettings:
    sharded = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    return EngineSettings.model_validate(
        {
            "name": engine,
            "tokens_per_micro_batch": tokens,
            "max_grad_norm": CLIP[optimizer],
            "optimizer": OPTIMIZERS[optimizer],
            "zero_stage": stage,
            "deepspeed": sharded,
        }
    )


def trajectory(
    engine: Any, batch: Batch, loss: Loss
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[float]]:
    """Gradients before the first step, weights after three steps, and the gradient norms."""
    parts = [(batch, loss)]
    sums = engine.accumulate(parts)
    gradients = engine.gradients()
    norms = [engine.apply(*sums)["grad_norm"].value] + [engine.train(parts)["grad_norm"].value for _ in range(2)]
    return gradients, {name: tensor.clone() for name, tensor in engine.state_dict().items()}, norms


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    return max(float((found[name] - expected[name]).abs().max()) for name in expected) / largest


def cases(stages: list[int], shape: Shape) -> Iterator[tuple[int, int, str, str]]:
    """(stage, micro-batches, optimizer, loss)"""
    for stage in stages:
        if shape.tensor > 1:
            yield from ((stage, 4, "sgd", "token"), (stage, 4, "sgd", "ppo"))
            yield from ((stage, 1, "adamw", "token"),) if shape.data > 1 else ()
            continue
        for accumulation in (1, 4):
            for optimizer in OPTIMIZERS:
                yield stage, accumulation, optimizer, "token"
        for loss in ("ppo", "gspo", "dpo", "gkd") if shape.data > 1 else ():
            yield stage, 4, "sgd", loss


def run_rank(rank: int, shape: Shape, port: int, folder: Path, stages: list[int]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(shape.num_ranks))
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    model, everything, at = folder / "model", rows(), Coordinates(rank, shape)
    shard = everything.take(shard_rows(shape.data)[at.data])
    references, expected_logprobs = {}, torch.empty(0)
    for optimizer, loss in dict.fromkeys((optimizer, loss) for _, _, optimizer, loss in cases(stages, shape)):
        alone = build_engine(
            model, settings("torch", optimizer, 10_000), Coordinates(0, Shape()), kind="causal_lm", trainable=True
        )
        expected_logprobs = alone.forward(shard, ("logprobs",), 1.0)["logprobs"].flat
        references[optimizer, loss] = trajectory(alone, everything, LOSSES[loss])
    records = []
    for stage, accumulation, optimizer, loss in cases(stages, shape):
        configured = settings("deepspeed", optimizer, budget(shape.data, accumulation, LOSSES[loss]), stage)
        engine = build_engine(model, configured, at, kind="causal_lm", trainable=True)
        logprobs = engine.forward(shard, ("logprobs",), 1.0)["logprobs"].flat
        gradients, weights, norms = trajectory(engine, shard, LOSSES[loss])
        expected_gradients, expected_weights, expected_norms = references[optimizer, loss]
        record = {"stage": stage, "accumulation": accumulation, "optimizer": optimizer, "loss": loss}
        record["shape"] = f"{shape.tensor}x{shape.data}"
        record["logprobs"] = float((logprobs - expected_logprobs).abs().max())
        record["gradient"] = relative_error(gradients, expected_gradients)
        record["weights"] = relative_error(weights, expected_weights)
        record["norm"] = max(abs(a / b - 1) for a, b in zip(norms, expected_norms, strict=True))
        record["clipped"] = CLIP[optimizer] is not None and min(norms) > CLIP[optimizer]
        records.append(record)
        engine.engine.destroy()
    (folder / f"records-{shape.tensor}x{shape.data}-{rank}.json").write_text(json.dumps(records))
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure(shape: Shape, folder: Path, stages: list[int]) -> list[dict[str, Any]]:
    """The records of every rank."""
    context = multiprocessing.get_context("spawn")
    port, numbers = free_port(), range(shape.num_ranks)
    ranks = [context.Process(target=run_rank, args=(rank, shape, port, folder, stages)) for rank in numbers]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit(f"a rank failed: exit codes {[process.exitcode for process in ranks]}")
    files = [folder / f"records-{shape.tensor}x{shape.data}-{rank}.json" for rank in numbers]
    return [record for file in files for record in json.loads(file.read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--shapes", nargs="+", default=["1x1", "1x2", "2x1", "2x2"], help="tensor x data")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    worst = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        initialise(MODEL, folder / "model", seed=1)
        print("ZeRO  shape  micro-batches  optimizer  loss   gradient   weights    norm       logprobs   clipped")
        for name in arguments.shapes:
            tensor, data = (int(size) for size in name.split("x"))
            for record in measure(Shape(tensor=tensor, data=data), folder, arguments.stages):
                print(
                    f"{record['stage']:>4} {record['shape']:>6} {record['accumulation']:>14}  {record['optimizer']:<9} "
                    f" {record['loss']:<5} {record['gradient']:>9.1e}  {record['weights']:>9.1e}  "
                    f"{record['norm']:>9.1e}  {record['logprobs']:>9.1e}  {record['clipped']}"
                )
                worst = max(
                    worst,
                    record["gradient"] / TOLERANCES["gradient"],
                    record["norm"] / TOLERANCES["gradient"],
                    record["weights"] / TOLERANCES[record["optimizer"]],
                    record["logprobs"] / TOLERANCES["logprobs"],
                )
    print(f"ratio {worst:.3f}")
    raise SystemExit(0 if worst <= 1 else 1)


if __name__ == "__main__":
    main()
