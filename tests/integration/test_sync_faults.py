"""Weight syncs on real Ray, with Hugging Face engines: they carry the weights, and what happens when a rank fails."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import faulty_workers
import numpy as np
import pytest
import torch
from faulty_workers import Fault, FaultyActor, FaultyRollout

from hybridflow.batch import Batch, Ragged
from hybridflow.batch_ref import BatchRef
from hybridflow.controller.coordinates import Shape
from hybridflow.errors import RankFailure, WeightSyncError
from hybridflow.resharding.transport import PublishedMemory, ThroughStore
from hybridflow.schedule.policy_sync import PolicySync
from workers.generation.base import Sampling
from workers.generation.settings import RolloutSettings
from workers.training.settings import EngineSettings

TIMEOUT_S = 20
PROBE = [3, 14, 15, 9, 26, 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=64, eos_token_id=1, **sizes))
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@pytest.fixture
def start(make_ray_runtime: Any, folder: Path) -> Any:
    """Two data ranks of an actor and two engines, after their first sync. Their classes go to the ranks by value."""
    import ray

    ray.cloudpickle.register_pickle_by_value(faulty_workers)

    def started(fault: Fault | None = None, of: str = "rollout", split: bool = True) -> PolicySync:
        runtime = make_ray_runtime(call_timeout_s=TIMEOUT_S)
        one = runtime.pool("one", 2, cpus_per_bundle=0.2, max_groups=2)
        two = runtime.pool("two", 2, cpus_per_bundle=0.2) if split else one
        trainer = EngineSettings(name="torch", tokens_per_micro_batch=256)
        actor = partial(FaultyActor, model_folder=str(folder), settings=trainer, fault=fault if of == "actor" else None)
        engines = partial(
            FaultyRollout, model_folder=str(folder), tokenizer="char",
            settings=RolloutSettings(engine="hf", sampling=Sampling(max_response_tokens=4)),
            fault=fault if of == "rollout" else None,
        )  # fmt: skip
        groups = [
            runtime.group("actor", actor, one, Shape(data=2)),
            runtime.group("rollout", engines, two, Shape(data=2)),
        ]
        runtime.ready(groups, timeout_s=400)
        policy = PolicySync(*groups, PROBE, tolerance=1e-4, bucket_bytes=10_000)
        policy.sync()
        groups[0].train().result()
        policy.store = runtime.store
        return policy

    return started


def generate(policy: PolicySync) -> Any:
    rows = {"prompt_tokens": Ragged.from_rows([[2, 3], [4, 5]], torch.int64), "index": torch.arange(2)}
    requests = BatchRef.put(Batch({**rows, "group": torch.arange(2), "seed": torch.arange(2)}), policy.store)
    return policy.rollout.generate(requests).result(60)


def same_weights(policy: PolicySync) -> bool:
    (trained, _), engines = policy.actor.weights().result(), policy.rollout.weights().result()
    return all(torch.equal(held[name], tensor) for held in engines for name, tensor in trained.items())


@pytest.mark.parametrize("split", [True, False], ids=["split", "colocated"])
def test_engines_hold_the_trainers_weights_after_each_sync(start: Any, split: bool) -> None:
    policy = start(split=split)
    assert policy.route().transport == PublishedMemory()
    assert not same_weights(policy)
    metrics = policy.sync()
    assert same_weights(policy)
    assert metrics["sync/bytes"].value == 2 * sum(t.nbytes for t in policy.actor.weights().result()[0].values())
    assert metrics["sync/probe_difference_max"].value < 1e-4
    assert set(np.unique(generate(policy).fetch(policy.store, ["versions"]).ragged("versions").flat)) == {-1, 2}


def test_the_store_carries_them_just_as_well(start: Any) -> None:
    from dataclasses import replace

    policy = start()
    policy._route = replace(policy.route(), transport=ThroughStore(10_000))
    assert policy.sync()["sync/version"].value == 2
    assert same_weights(policy)


@pytest.mark.parametrize(
    ("how", "of", "said"),
    [
        ("die", "rollout", r"(?s)rank died.*role    rollout\n.*rank    1\n.*SIGKILL.*rollout\.receive"),
        ("hang", "rollout", r"(?s)rank hung.*role    rollout\n.*rank    1\n.*rollout\.receive.*not answered: 1\n"),
        ("die", "actor", r"(?s)rank died.*role    actor\n.*rank    1\n.*SIGKILL.*actor\.offer"),
        ("hang", "actor", r"(?s)rank hung.*role    actor\n.*rank    1\n.*actor\.offer.*not answered: 1\n"),
    ],
)
def test_a_rank_that_is_lost_is_named_in_time_and_nothing_is_served(start: Any, how: str, of: str, said: str) -> None:
    policy = start(Fault(how, rank=1), of)
    began = time.monotonic()
    with pytest.raises(RankFailure, match=said):
        policy.sync()
    assert time.monotonic() - began < TIMEOUT_S + 12
    assert policy.version == 1
    with pytest.raises(RankFailure):  # the run is over: no call goes through, to no engine
        generate(policy)


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [("raise", RankFailure, "out of luck"), ("flip", WeightSyncError, "rollout rank 1, .*checksums as received")],
)
def test_an_engine_that_took_half_serves_nothing_until_a_sync_succeeds(
    start: Any, how: str, error: type[Exception], said: str
) -> None:
    policy = start(Fault(how, rank=1))
    with pytest.raises(error, match=said):
        policy.sync()
    assert policy.version == 1
    with pytest.raises(RankFailure, match="weights of version 2 are not proven yet"):
        generate(policy)
    policy.sync()
    assert policy.version == 2 and same_weights(policy)
    assert generate(policy).num_rows == 2
