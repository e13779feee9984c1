"""Log-probs of engines against the trainer's after 20 random updates, each synced, in every layout.

    python benchmarks/reshard_drift.py [--cases qwen2-tied:1-2-1 ...] [--updates 20]

The real thing in small: DeepSpeed actors on Ray, vLLM engines, `PolicySync`. Float32 models of two layers: Qwen2 and
Llama, tied and untied, in training layouts (p-t-d) 1-1-2, 1-2-1 and 1-2-2, ZeRO 0 to 3 in turn; a mixture of experts
(Mixtral), tied and untied, in 1-1-2 alone, since AutoTP refuses experts. Every case feeds four sets of engines: t_g 1
and 2, each with 1 and 2 replicas.

An update is one optimizer step of a policy loss on random rows with random advantages, at a rate at which it moves
log-probs by far more than the bar: an engine that missed one would be seen. After each, every engine is synced and
compared with the trainer on a fresh random text (the sync's probe: prompt log-probs). At the end of a case the engines
sample, and the log-probs of their samples are compared with the trainer's too; then what engines hold is read back and
compared bit for bit, but for experts, which are packed for the CPU's kernels. Exits with 1 where a difference is above
1e-4 nats, an update moves less than 100 times that, or a read-back differs; ends with `ratio <bar / worst>`.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ray
import torch

from algorithms.losses import PolicyLoss
from algorithms.objectives import ClippedRatio
from hybridflow.batch import Batch, Ragged
from hybridflow.batch_ref import BatchRef
from hybridflow.controller.coordinates import Shape
from hybridflow.controller.ray_runtime import RayRuntime, start_ray
from hybridflow.errors import WeightSyncError
from hybridflow.schedule.policy_sync import PolicySync
from workers.actor import ActorWorker
from workers.generation.base import Sampling
from workers.generation.settings import RolloutSettings
from workers.rollout import RolloutWorker
from workers.training.settings import EngineSettings

BAR = 1e-4  # nats
LEAST_MOVE = 100 * BAR
VOCABULARY, PROBE_TOKENS, NUM_ROWS, ROW_TOKENS = 82, 128, 16, 24
KINDS = {"qwen2": "Qwen2", "llama": "Llama", "mixtral": "Mixtral"}
ENGINES = ((1, 1), (1, 2), (2, 1), (2, 2))
"""(t_g, replicas)"""
LAYOUTS = ("1-1-2", "1-2-1", "1-2-2")


@dataclass(frozen=True)
class Case:
    kind: str
    tied: bool
    training: str
    zero_stage: int

    @property
    def model(self) -> str:
        return f"{self.kind}-{'tied' if self.tied else 'untied'}"

    @property
    def name(self) -> str:
        return f"{self.model}:{self.training}"

    @property
    def shape(self) -> Shape:
        pipeline, tensor, data = map(int, self.training.split("-"))
        return Shape(pipeline=pipeline, tensor=tensor, data=data)


def all_cases() -> Iterator[Case]:
    """Each layout meets all four ZeRO stages."""
    for index, (kind, tied) in enumerate((kind, tied) for kind in ("qwen2", "llama") for tied in (True, False)):
        for layout, training in enumerate(LAYOUTS):
            yield Case(kind, tied, training, (index + layout) % 4)
    yield Case("mixtral", True, "1-1-2", 1)
    yield Case("mixtral", False, "1-1-2", 3)


@dataclass
class Found:
    """Of one case and set of engines. probes: the largest difference of each sync. sampled: over sampled tokens.
    moves: each update's largest change of a log-prob of one fixed text."""

    probes: list[float] = field(default_factory=list)
    sampled: float = 0.0
    moves: list[float] = field(default_factory=list)
    read_back: str = ""

    @property
    def worst(self) -> float:
        return max(*self.probes, self.sampled)

    @property
    def good(self) -> bool:
        return self.worst <= BAR and min(self.moves) >= LEAST_MOVE and self.read_back.startswith("same")


def write_model(case: Case, folder: Path) -> str:
    import transformers

    torch.manual_seed(7)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    more: dict[str, Any] = {"num_local_experts": 4} if case.kind == "mixtral" else {}
    more |= {"tie_word_embeddings": case.tied, "eos_token_id": 1, "initializer_range": 0.08}
    config = getattr(transformers, f"{KINDS[case.kind]}Config")(**sizes, **heads, **more)
    model = getattr(transformers, f"{KINDS[case.kind]}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at the start, which would hide a lost one
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    return str(folder)


def random_rows(generator: torch.Generator) -> Batch:
    total = NUM_ROWS * ROW_TOKENS
    lengths = torch.full((NUM_ROWS,), ROW_TOKENS)
    mask = torch.ones(NUM_ROWS, ROW_TOKENS, dtype=torch.bool)
    mask[:, 0] = False
    return Batch(
        {
            "tokens": Ragged(torch.randint(0, VOCABULARY, (total,), generator=generator), lengths),
            "response_mask": Ragged(mask.flatten(), lengths),
            "loss_weight": torch.full((NUM_ROWS,), 1 / int(mask.sum()), dtype=torch.float64),
            "advantages": Ragged(torch.randn(total, generator=generator), lengths),
            "rollout_logprobs": Ragged(torch.zeros(total), lengths),
        }
    )


def random_text(generator: torch.Generator) -> list[int]:
    return torch.randint(2, VOCABULARY, (PROBE_TOKENS,), generator=generator).tolist()


def start_actor(runtime: RayRuntime, case: Case, model: str) -> Any:
    chosen = {"optimizer": {"lr": 3e-3}, "zero_stage": case.zero_stage, "max_grad_norm": None, "threads": 1}
    settings = EngineSettings.model_validate({**chosen, "tokens_per_micro_batch": 4 * ROW_TOKENS})
    pool = runtime.pool("train", case.shape.num_ranks, cpus_per_bundle=0.5)
    factory: Any = partial(ActorWorker, model_folder=model, settings=settings)
    return runtime.group("actor", factory, pool, case.shape)


def start_engines(runtime: RayRuntime, model: str) -> list[Any]:
    groups = []
    for tensor, replicas in ENGINES:
        settings = RolloutSettings(
            tensor_parallel_size=tensor, kv_cache_gib=0.05, max_num_seqs=8, sampling=Sampling(max_response_tokens=32)
        )
        factory: Any = partial(RolloutWorker, model_folder=model, settings=settings, tokenizer="char")
        pool = runtime.pool(f"engines-{tensor}x{replicas}", tensor * replicas, cpus_per_bundle=0.5)
        name = f"rollout-{tensor}x{replicas}"
        groups.append(runtime.group(name, factory, pool, Shape(data=replicas), bundles_per_rank=tensor))
    return groups


class Drift:
    """One actor and its sets of engines."""

    def __init__(self, runtime: RayRuntime, actor: Any, engines: list[Any]) -> None:
        self.runtime, self.actor, self.engines = runtime, actor, engines
        self.syncs = [PolicySync(actor, rollout, [], float("inf"), 1 << 20) for rollout in engines]
        self.found = [Found() for _ in engines]
        self.generator = torch.Generator().manual_seed(11)
        self.loss = PolicyLoss(1.0, ClippedRatio(0.2, 0.28), old_column=None)

    def run(self, num_updates: int) -> None:
        fixed = random_text(self.generator)
        before = self.of_trainer([fixed])
        for _ in range(num_updates):
            self.actor.update(BatchRef.put(random_rows(self.generator), self.runtime.store), self.loss).result()
            after = self.of_trainer([fixed])
            move = float((after - before).abs().max())
            before = after
            for sync, found in zip(self.syncs, self.found, strict=True):
                self.turn_to(sync)
                sync.probe = random_text(self.generator)
                found.probes.append(sync.sync()["sync/probe_difference_max"].value)
                found.moves.append(move)
        for sync, found in zip(self.syncs, self.found, strict=True):
            found.sampled = self.sampled(sync.rollout)
            found.read_back = self.read_back(sync)

    def turn_to(self, sync: PolicySync) -> None:
        """The actor's ranks know one route at a time, and here they feed four sets of engines."""
        sync.through(sync.route().transport)
        sync.use(sync.route())

    def read_back(self, sync: PolicySync) -> str:
        self.turn_to(sync)
        try:
            unread = sync.read_back()
        except WeightSyncError as error:
            return str(error)
        return "same, experts not read" if unread else "same"

    def of_trainer(self, texts: list[list[int]]) -> torch.Tensor:
        """Log-probs of all tokens of these texts, one after another."""
        rows = BatchRef.put(Batch({"tokens": Ragged.from_rows(texts, torch.int64)}), self.runtime.store)
        scored = self.actor.logprobs(rows, 1.0, "logprobs").result()
        return scored.fetch(self.runtime.store, ["logprobs"]).ragged("logprobs").flat

    def sampled(self, rollout: Any) -> float:
        """The largest difference over the tokens that the engines sample now."""
        prompts = [random_text(self.generator)[:8] for _ in range(8)]
        rows = Batch(
            {
                "prompt_tokens": Ragged.from_rows(prompts, torch.int64),
                "group": torch.arange(len(prompts)),
                "seed": torch.arange(len(prompts)),
            }
        )
        drawn = rollout.generate(BatchRef.put(rows, self.runtime.store)).result()
        scored = self.actor.logprobs(drawn, 1.0, "logprobs").result()
        theirs = drawn.fetch(self.runtime.store, ["rollout_logprobs", "response_mask"])
        ours = scored.fetch(self.runtime.store, ["logprobs"]).ragged("logprobs")
        mask = theirs.ragged("response_mask").flat
        return float((theirs.ragged("rollout_logprobs").flat - ours.flat)[mask].abs().max())


def report(case: Case, drift: Drift, seconds: float) -> None:
    for (tensor, replicas), found in zip(ENGINES, drift.found, strict=True):
        print(
            f"{case.name:<20} ZeRO {case.zero_stage}  t_g {tensor} x {replicas}  largest difference: prompts "
            f"{max(found.probes):.1e}, sampled {found.sampled:.1e}  smallest move of an update {min(found.moves):.2f}  "
            f"read back: {found.read_back}{'' if found.good else '  MISSED'}",
            flush=True,
        )
    print(f"{case.name}: {seconds:.0f} s", flush=True)


def run_model(cases: list[Case], folder: Path, num_updates: int) -> list[Found]:
    """The engines stay for all of a model's cases: a sync replaces all that they hold."""
    model = write_model(cases[0], folder / "model")
    held = RayRuntime(folder / "engines")
    results = []
    try:
        engines = start_engines(held, model)
        for case in cases:
            began = time.perf_counter()
            runtime = RayRuntime(folder / case.training)
            try:
                actor = start_actor(runtime, case, model)
                runtime.ready([actor])
                held.ready(engines)
                drift = Drift(runtime, actor, engines)
                drift.run(num_updates)
            finally:
                runtime.shutdown()
            report(case, drift, time.perf_counter() - began)
            results += drift.found
    finally:
        held.shutdown()
    return results


def main() -> int:
    known = {case.name: case for case in all_cases()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=known, default=list(known), metavar="case", help=", ".join(known))
    parser.add_argument("--updates", type=int, default=20)
    options = parser.parse_args()
    by_model: dict[str, list[Case]] = {}
    for name in dict.fromkeys(options.cases):
        by_model.setdefault(known[name].model, []).append(known[name])
    start_ray(num_cpus=32)
    found: list[Found] = []
    with tempfile.TemporaryDirectory(prefix="reshard-drift-") as folder:
        try:
            for model, cases in by_model.items():
                found += run_model(cases, Path(folder) / model, options.updates)
        finally:
            ray.shutdown()
    print(f"ratio {BAR / max(one.worst for one in found):.2f}")
    return 0 if all(one.good for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
