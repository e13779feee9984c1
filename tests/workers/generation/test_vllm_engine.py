import queue
import threading

import pytest
import torch

from hybridflow.errors import ConfigError, WeightSyncError
from tests.workers.generation.trainer import deliver
from workers.generation.base import Request, Sampling
from workers.generation.settings import RolloutSettings
from workers.generation.vllm_device import cores_of, engine_arguments

pytest.importorskip("vllm", reason="vLLM is an optional extra")

LONG = Sampling(max_response_tokens=120)
WANTED = [Request(i, i, [7 + i, 8, 9], 40 + i) for i in range(12)]


def in_thread(engine, wanted, sampling) -> "queue.SimpleQueue":
    """Groups as they come, then None."""
    groups: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        for group in engine.generate(wanted, sampling):
            groups.put(group)
        groups.put(None)

    threading.Thread(target=run, daemon=True).start()
    return groups


def rest(groups: "queue.SimpleQueue") -> dict:
    return {sample.index: sample for group in iter(lambda: groups.get(timeout=60), None) for sample in group}


def test_paused_requests_go_on_as_if_nothing_had_happened_and_carry_both_versions(vllm_engine, tied):
    deliver(vllm_engine, tied.model, 0, [1, 2])
    whole = {s.index: s for group in vllm_engine.generate(WANTED, LONG) for s in group}
    groups = in_thread(vllm_engine, WANTED, LONG)
    first = groups.get(timeout=60)
    vllm_engine.pause()
    deliver(vllm_engine, tied.model, 5, list(range(20)))  # the same weights under a new version
    vllm_engine.resume()
    interrupted = {**{s.index: s for s in first}, **rest(groups)}
    assert {i: s.tokens for i, s in interrupted.items()} == {i: s.tokens for i, s in whole.items()}
    assert all(s.versions == sorted(s.versions) and len(s.versions) == len(s.tokens) for s in interrupted.values())
    assert {0, 5} == {version for s in interrupted.values() for version in s.versions}
    assert any(set(s.versions) == {0, 5} for s in interrupted.values())
    deliver(vllm_engine, tied.model, 0, [1, 2])


def test_a_new_request_does_not_meet_what_held_ones_computed_with_old_weights(vllm_engine, tied):
    """Of prompts that begin alike for more than a block (128 tokens on a CPU), so that they share one."""
    deliver(vllm_engine, tied.model, 0, [1, 2])
    prompt, other = [6 + 7 * i % 70 for i in range(150)], tied.perturbed(seed=4)
    wanted = [Request(i, i, [*prompt, 10 + i], 60 + i) for i in range(12)]
    groups = in_thread(vllm_engine, wanted, Sampling(max_response_tokens=100))
    first = groups.get(timeout=60)
    vllm_engine.pause()
    deliver(vllm_engine, other.model, 6, [1, 2])
    vllm_engine.resume()
    ((new,),) = vllm_engine.generate([Request(0, 0, prompt, 5)], Sampling(max_response_tokens=8))
    exact = other.logprobs(prompt, new.tokens)[torch.arange(len(new.tokens)), new.tokens]
    assert set(new.versions) == {6} and torch.tensor(new.logprobs).sub(exact).abs().max() < 1e-4
    held = [s for s in [*first, *rest(groups).values()] if set(s.versions) == {0, 6}]
    assert held, "none was running when the weights came"
    for sample in held:  # what came after the new weights is theirs alone
        start = sample.versions.index(6)
        exact = other.logprobs(wanted[sample.index].prompt, sample.tokens)[range(len(sample.tokens)), sample.tokens]
        assert torch.tensor(sample.logprobs).sub(exact)[start:].abs().max() < 1e-4
    deliver(vllm_engine, tied.model, 0, [1, 2])


def test_nothing_is_drawn_while_paused(vllm_engine):
    vllm_engine.pause()
    groups = in_thread(vllm_engine, WANTED[:2], LONG)
    with pytest.raises(queue.Empty):
        groups.get(timeout=0.3)
    vllm_engine.abort()
    vllm_engine.resume()
    assert set(rest(groups)) == {0, 1}


def test_a_transfer_that_fails_half_way_leaves_an_engine_that_refuses(vllm_engine, tied, monkeypatch):
    def broken(*_):
        raise RuntimeError("the worker died")

    with monkeypatch.context() as patch:
        patch.setattr(vllm_engine, "_rpc", broken)
        with pytest.raises(RuntimeError, match="the worker died"):
            deliver(vllm_engine, tied.model, 3, [1, 2])
    with pytest.raises(WeightSyncError, match="half-way"):
        next(vllm_engine.generate(WANTED, LONG))
    deliver(vllm_engine, tied.model, 0, [1, 2])
    assert len(list(vllm_engine.generate(WANTED, Sampling(max_response_tokens=2)))) == len(WANTED)


def test_each_replica_gets_cores_of_its_own():
    assert [cores_of(replica, 1, 1, [0, 1]) for replica in range(3)] == ["0", "1", "0"]
    assert [cores_of(replica, 2, 1, [0, 1, 2, 3]) for replica in range(2)] == ["0|1", "2|3"]
    assert [cores_of(replica, 2, 2, list(range(4, 12))) for replica in range(2)] == ["4,5|6,7", "8,9|10,11"]


def test_heads_that_the_cpu_kernel_lacks_are_refused_before_the_start(tmp_path):
    from transformers import Qwen2Config

    from workers.generation.vllm_device import engine_arguments

    Qwen2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=4).save_pretrained(tmp_path)
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        with pytest.raises(ConfigError, match="attention heads of 16"):
            engine_arguments(tmp_path, RolloutSettings(), 128)
    else:
        assert engine_arguments(tmp_path, RolloutSettings(), 128)["enable_sleep_mode"]


def test_a_float32_head_is_asked_of_vllm_by_its_own_setting(tied):
    plain = engine_arguments(tied.folder, RolloutSettings(dtype="bfloat16"), 256)
    asked = engine_arguments(tied.folder, RolloutSettings(dtype="bfloat16", float32_head=True), 256)
    assert "hf_overrides" not in plain and asked["hf_overrides"] == {"head_dtype": "float32"}
