"""A sync into a real vLLM engine against "save, and let vLLM reload from disk", with the engine's own reload apart.

    python benchmarks/reshard_reload.py [--hidden 768] [--layers 12] [--rounds 3]

An actor of two DeepSpeed tensor ranks and one vLLM engine on Ray; a dense float32 Qwen2, 100 M parameters by default.

  sync               from end to end: offer, checksums of both sides, vLLM's loaders and repacking, probes, proofs
  receive            of it, the engine's part: copy, checksums, vLLM's own reload, probe
  copy               of that, the copy and the checksums alone, in the rollout rank's process
  own reload         what is left of receive: vLLM's loaders and repacking, which every route into it pays, and a probe
  disk               the actor gathers and saves safetensors, flushed; vLLM reloads the folder with its own loader
  page cache         the same, unflushed: the disk is never waited for

Seconds are the best of the rounds. Exits with 1 where, without the engine's own reload, sync is less than 3 times as
fast as the disk route. The last line is `ratio <that / 3>`.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from hybridflow.controller.coordinates import Shape
from hybridflow.controller.dispatch import dispatch
from hybridflow.controller.ray_runtime import RayRuntime
from hybridflow.resharding.incoming import assemble
from hybridflow.resharding.published import mapped
from hybridflow.resharding.transport import Delivery, Offer
from hybridflow.schedule.policy_sync import PolicySync
from workers.actor import ActorWorker
from workers.generation.settings import RolloutSettings
from workers.rollout import RolloutWorker
from workers.training.settings import EngineSettings

LEAST_TIMES = 3.0
PROBE = [3, 14, 15, 9, 26, 5, 35, 8]


class TimedRollout(RolloutWorker):
    @dispatch("ONE_TO_ALL")
    def copied(self, offers: tuple[Offer, ...]) -> float:
        """Seconds of the copy and its checksums, into memory that the second of two goes finds mapped."""
        seconds = 0.0
        taken = self._transport.take(self._incoming, offers, self.context.store)
        into = {
            filling.storage.name: torch.zeros(filling.storage.num_elements) for filling in taken.incoming[0].fillings
        }
        for _ in range(2):
            began = time.perf_counter()
            with mapped(taken.publications) as sources:
                for _ in assemble(taken.incoming[0], sources, into):
                    pass
            seconds = time.perf_counter() - began
        return seconds

    @dispatch("ONE_TO_ALL")
    def reload_from(self, folder: str) -> None:
        """vLLM's own way: its loader, from a folder."""
        engine: Any = self.engine
        engine._wait(engine._engine.collective_rpc("reload_weights", kwargs={"weights_path": folder}))


def best(rounds: int, run: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def model_folder(folder: Path, hidden: int, layers: int) -> str:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=16384, hidden_size=hidden, intermediate_size=8 * hidden // 3, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 192, max_position_embeddings=64,
        tie_word_embeddings=False, eos_token_id=1,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters", flush=True)
    return str(folder)


def through_disk(actor: Any, rollout: Any, folder: Path, flush: bool) -> None:
    actor.export(str(folder)).result()
    if flush:
        for file in folder.glob("*.safetensors"):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    rollout.reload_from(str(folder)).result()


def measured(runtime: RayRuntime, model: str, folder: Path, rounds: int) -> dict[str, float]:
    pool, engines = runtime.pool("train", 2, cpus_per_bundle=0.5), runtime.pool("engines", 1, cpus_per_bundle=0.5)
    settings = EngineSettings(zero_stage=1, threads=1)
    rollout_settings = RolloutSettings(kv_cache_gib=0.05, max_num_seqs=8)
    made: Any = partial(ActorWorker, model_folder=model, settings=settings)
    actor = runtime.group("actor", made, pool, Shape(data=1, tensor=2))
    made = partial(TimedRollout, model_folder=model, settings=rollout_settings, tokenizer="char")
    rollout = runtime.group("rollout", made, engines, Shape())
    runtime.ready([actor, rollout])
    policy = PolicySync(actor, rollout, PROBE, 1e-3, 64 << 20)
    policy.sync()
    found = {"sync": best(rounds, policy.sync)}
    offers = tuple(actor.offer().result())
    found["receive"] = best(rounds, lambda: rollout.receive(Delivery(9, offers, tuple(PROBE))).result())
    found["copy"] = max(rollout.copied(offers).result())
    found["own reload"] = found["receive"] - found["copy"]
    found["disk"] = best(rounds, lambda: through_disk(actor, rollout, folder, True))
    found["page cache"] = best(rounds, lambda: through_disk(actor, rollout, folder, False))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="reshard-reload-", dir=Path.cwd()) as folder:
        model = model_folder(Path(folder) / "model", options.hidden, options.layers)
        runtime = RayRuntime(Path(folder) / "run", num_cpus=8)
        try:
            found = measured(runtime, model, Path(folder) / "saved", options.rounds)
        finally:
            runtime.shutdown()
    for name, seconds in found.items():
        print(f"  {name:<12}{seconds:9.3f} s", flush=True)
    own = found["own reload"]
    times, cached = ((found[name] - own) / (found["sync"] - own) for name in ("disk", "page cache"))
    print(
        f"sync: {found['disk'] / found['sync']:.1f} times as fast as the disk route, "
        f"{found['page cache'] / found['sync']:.1f} times as fast as the page cache; without the engine's own reload "
        f"{times:.1f} and {cached:.1f} times"
    )
    print(f"ratio {times / LEAST_TIMES:.2f}")
    return 0 if times >= LEAST_TIMES else 1


if __name__ == "__main__":
    sys.exit(main())
