"""Part (ii) of `reshard_bytes.py`: bytes into real engines, from an actor of two data ranks on Ray."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hybridflow.controller.coordinates import Shape
from hybridflow.controller.ray_runtime import RayRuntime
from hybridflow.resharding.layout import Layout, dtype_of
from hybridflow.resharding.transport import Packed, PublishedMemory, ThroughStore, Transport
from hybridflow.schedule.policy_sync import PolicySync
from workers.actor import ActorWorker
from workers.generation.settings import RolloutSettings
from workers.rollout import RolloutWorker
from workers.training.settings import EngineSettings

BUCKET_BYTES = 1 << 20
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Case:
    engine: str
    tensor: int
    replicas: int

    @property
    def label(self) -> str:
        return f"{self.engine}, t_g {self.tensor} x {self.replicas}"


CASES = (Case("hf", 1, 1), Case("hf", 1, 2), Case("vllm", 1, 1), Case("vllm", 2, 1), Case("vllm", 1, 2))


def into_engines(engines: Sequence[str]) -> tuple[bool, int, int]:
    """Prints a line a case and transport: (all exact, bytes moved, bytes of the shards)."""
    good, moved, shards = True, 0, 0
    with tempfile.TemporaryDirectory(prefix="reshard-engines-") as folder:
        model = _model(Path(folder) / "model")
        for number, case in enumerate(case for case in CASES if case.engine in engines):
            runtime = RayRuntime(Path(folder) / str(number), num_cpus=8)
            try:
                policy = _started(runtime, model, case)
                asked = sum(shard_bytes(held.layout) for held in policy.rollout.layout().result())
                for transport in (PublishedMemory(), ThroughStore(BUCKET_BYTES)):
                    sent, came = _moved(policy, transport)
                    exact = sent == came == asked
                    good, moved, shards = good and exact, moved + sent, shards + asked
                    print(
                        f"{case.label:<20} {type(transport).__name__:<16} sent {sent:>10,} B  proven {came:>10,} B  "
                        f"shards {asked:>10,} B  {'exact' if exact else 'WRONG'}",
                        flush=True,
                    )
            finally:
                runtime.shutdown()
    return good, moved, shards


def shard_bytes(layout: Layout) -> int:
    """Of all of an engine's tensor ranks, without padding."""
    return sum(
        (held.num_elements - sum(stop - start for start, stop in held.padding)) * dtype_of(held.dtype).itemsize
        for held in layout.storages
    )


def _moved(policy: PolicySync, transport: Transport) -> tuple[int, int]:
    """(bytes that left the sources, bytes that the engines' checksums prove) of one sync."""
    policy.through(transport)
    came = int(policy.sync()["sync/bytes"].value)
    packed = [offer.num_bytes for offer in policy.actor.offer().result() if isinstance(offer, Packed)]
    published = sum(
        checksum.num_bytes for sums, _ in policy.actor.prove(policy.probe).result() for checksum in sums.values()
    )
    return sum(packed) if packed else published, came


def _model(folder: Path) -> str:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=82, num_key_value_heads=2, max_position_embeddings=64, eos_token_id=1, **SIZES)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def _started(runtime: RayRuntime, model: str, case: Case) -> PolicySync:
    train = runtime.pool("train", 2, cpus_per_bundle=0.5)
    engines = runtime.pool("engines", case.replicas * case.tensor, cpus_per_bundle=0.5)
    actor: Any = partial(ActorWorker, model_folder=model, settings=EngineSettings(name="torch"))
    settings = RolloutSettings(engine=case.engine, tensor_parallel_size=case.tensor, kv_cache_gib=0.1, max_num_seqs=8)  # type: ignore[arg-type]
    rollout: Any = partial(RolloutWorker, model_folder=model, settings=settings, tokenizer="char")
    groups = [
        runtime.group("actor", actor, train, Shape(data=2)),
        runtime.group("rollout", rollout, engines, Shape(data=case.replicas), bundles_per_rank=case.tensor),
    ]
    runtime.ready(groups)
    return PolicySync(*groups, [3, 14, 15, 9, 26], 1e-4, BUCKET_BYTES)
