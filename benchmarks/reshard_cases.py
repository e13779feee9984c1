"""Six runs that cover all pairs of (training layout, t_g, replicas, colocated or split), end to end on two cores.

    python benchmarks/reshard_cases.py [case ...]

Each trains a tiny random model with GRPO for two steps on Ray, DeepSpeed and vLLM, and prints the largest difference
between the log-probs of trainer and engines: of the sampled tokens, and of the probe after each resharding. Exits with
1 where a run fails or a difference is above 5e-6; ends with `ratio <largest difference / 5e-6>`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

LIMIT = 5e-6  # nats, float32
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Case:
    """training: p-t-d. engines: t_g x replicas. overrides: what makes the case."""

    training: str
    generation_tensor: int
    replicas: int
    placement: str
    zero_stage: int

    @property
    def overrides(self) -> list[str]:
        pipeline, tensor, data = map(int, self.training.split("-"))
        ranks, workers = pipeline * tensor * data, self.generation_tensor * self.replicas
        colocated = self.placement == "colocated"
        pools = (
            {"all": (max(ranks, workers), 2.0)} if colocated else {"policy": (ranks, 1.0), "generation": (workers, 0.8)}
        )
        return [
            f"placement={self.placement}",
            *(f"placement.pools.{name}.ranks={count}" for name, (count, _) in pools.items()),
            *(f"placement.pools.{name}.cpus_per_rank={cores / count:g}" for name, (count, cores) in pools.items()),
            *([] if colocated else ["placement.pools.value.ranks=1", "placement.pools.value.cpus_per_rank=0.2"]),
            f"placement.roles.actor.ranks={ranks}",
            f"placement.roles.actor.tensor={tensor}",
            f"placement.roles.rollout.ranks={self.replicas}",
            "placement.roles.reward.ranks=1",
            f"rollout.tensor_parallel_size={self.generation_tensor}",
            f"engine.zero_stage={self.zero_stage}",
        ]


CASES = {
    "a1": Case("1-1-2", 1, 1, "colocated", 3),
    "a2": Case("1-1-2", 2, 2, "split", 1),
    "b1": Case("1-2-1", 1, 2, "split", 0),
    "b2": Case("1-2-1", 2, 1, "colocated", 2),
    "c1": Case("1-2-2", 1, 1, "split", 1),
    "c2": Case("1-2-2", 2, 2, "colocated", 3),
}

COMMON = [
    "algorithm=grpo", "algorithm.old_logprobs=recompute", "algorithm.samples_per_prompt=4", "model=small",
    "model.config.num_hidden_layers=2", "model.config.num_key_value_heads=2", "trainer.steps=2",
    "trainer.prompts_per_step=4", "trainer.export=false", "data.arithmetic.num_train=200",
    "data.arithmetic.num_validation=16", "rollout.kv_cache_gib=0.1", "rollout.max_num_seqs=16",
    "rollout.sampling.max_response_tokens=6", "rollout.validation.max_response_tokens=6", "reward=function",
    f"reward.function={Path(__file__).resolve()}:score", "actor.engine.optimizer.lr=1e-3",
]  # fmt: skip


def score(prompt: object, response: str, answer: object, **row: object) -> float:
    """Every response of a random model gets something, so that gradients, and with them the weights, move."""
    return sum(letter.isdigit() for letter in response) / 6 + 0.01 * len(response)


def steps_of(folder: Path) -> list[dict[str, float]]:
    """The metrics of each training step."""
    lines = (json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [metrics for metrics in lines if "actor/loss" in metrics]


def largest_difference(folder: Path) -> float:
    names = ("rollout/logratio_max", "sync/probe_difference_max")
    return max(metrics[name] for metrics in steps_of(folder) for name in names)


def run(name: str, folder: Path) -> bool:
    """Runs a case in a process of its own; whether it ended well and within the limit. Prints its line."""
    case, began = CASES[name], time.perf_counter()
    command = [sys.executable, "-m", "hybridflow.cli", "train", *COMMON, *case.overrides, f"run_folder={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    engines = f"t_g {case.generation_tensor} x {case.replicas}"
    what = f"{name}  {case.training} -> {engines} {case.placement:<9} ZeRO {case.zero_stage}"
    seconds = f"{time.perf_counter() - began:.0f} s"
    if done.returncode:
        print(f"{what}  FAILED in {seconds}\n{done.stdout[-2000:]}{done.stderr[-4000:]}", flush=True)
        return False
    difference = largest_difference(folder)
    verdict = "" if difference <= LIMIT else "  ABOVE THE LIMIT"
    print(f"{what}  largest log-prob difference {difference:.1e}  {seconds}{verdict}", flush=True)
    return difference <= LIMIT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"out of {', '.join(CASES)}; default: all")
    names = parser.parse_args().cases or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"unknown case {', '.join(unknown)}; allowed: {', '.join(CASES)}")
    with tempfile.TemporaryDirectory(prefix="reshard-cases-") as folder:
        good = [run(name, Path(folder) / name) for name in names]
        done = [largest_difference(path) for path in Path(folder).iterdir() if (path / "metrics.jsonl").exists()]
    print(f"ratio {max(done, default=float('inf')) / LIMIT:.3f}")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
