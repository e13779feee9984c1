import numpy as np
import pytest
import torch

from hybridflow.batch import Batch, Ragged
from hybridflow.batch_ref import BatchRef, Block
from hybridflow.controller.coordinates import Coordinates, Shape
from hybridflow.controller.worker import WorkerContext
from hybridflow.errors import WeightSyncError
from hybridflow.resharding.incoming import expected_checksums
from hybridflow.resharding.proofs import verify
from hybridflow.resharding.shards import Spec, build_layout, grid
from hybridflow.resharding.transport import Delivery, PublishedMemory, RankLayout, ThroughStore
from hybridflow.schedule.policy_sync import plan_route
from workers.generation.base import Sampling
from workers.generation.settings import RolloutSettings
from workers.rollout import RolloutWorker


class Memory:
    """A store of this process: a block's handle is its batch."""

    def put(self, batch):
        return Block(batch, None, batch.num_rows)

    def read(self, wants):
        return [(want.block.handle.select(want.columns), want.rows) for want in wants]


@pytest.fixture
def worker(tied, tmp_path):
    context = WorkerContext("rollout", Coordinates(0, Shape()), Memory(), "127.0.0.1", 0, "local", tmp_path)
    settings = RolloutSettings(
        engine="hf",
        sampling=Sampling(max_response_tokens=10),
        validation=Sampling(max_response_tokens=4, temperature=0),
    )
    return RolloutWorker(context, str(tied.folder), settings)


@pytest.fixture
def requests(worker):
    prompts = [[7, 8, 9], [7, 8, 9], [10, 11], [10, 11], [12, 13, 14, 15]]
    batch = Batch(
        {
            "prompt_tokens": Ragged.from_rows(prompts, torch.int64),
            "group": torch.tensor([4, 4, 2, 2, 9]),
            "seed": torch.tensor([1, 2**62, 3, 4, 5]),
            "index": torch.tensor([30, 10, 20, 50, 40]),
        }
    )
    return BatchRef.put(batch, worker.context.store)


def test_rows_keep_the_row_contract(worker, requests, tied):
    made = Batch.concat(list(worker.generate(requests)))
    asked = requests.fetch(worker.context.store)
    prompts = dict(zip(asked.tensor("index").tolist(), asked.ragged("prompt_tokens").rows(), strict=True))
    assert sorted(made.tensor("index").tolist()) == [10, 20, 30, 40, 50]
    columns = [made.ragged(n).rows() for n in ("tokens", "response_mask", "rollout_logprobs", "versions")]
    for row, (tokens, mask, logprobs, versions) in enumerate(zip(*columns, strict=True)):
        prompt = prompts[int(made.tensor("index")[row])].tolist()
        start, length = len(prompt), int(made.tensor("response_length")[row])
        assert tokens[:start].tolist() == prompt
        assert int(made.tensor("prompt_length")[row]) == start
        assert int(made.tensor("num_tokens")[row]) == start + length == len(tokens)
        assert mask.tolist() == [False] * start + [True] * length
        assert versions.tolist() == [-1] * start + [0] * length
        assert logprobs[:start].abs().sum() == 0
        response = tokens[start:].tolist()
        exact_T = tied.logprobs(prompt, response)[torch.arange(length), response]
        assert logprobs[start:].tolist() == pytest.approx(exact_T.tolist(), abs=1e-5)
        assert bool(made.tensor("truncated")[row]) == (response[-1] not in (1, 5))
    assert made.ragged("rollout_logprobs").flat.dtype == torch.float32
    assert made.ragged("versions").flat.dtype == torch.int32


def test_a_group_comes_in_one_batch(worker, requests):
    parts = [sorted(part.tensor("index").tolist()) for part in worker.generate(requests)]
    assert sorted(parts) == [[10, 30], [20, 50], [40]]


def test_validation_has_its_own_sampling(worker, requests, tied):
    for part in worker.generate(requests, "validate"):
        assert max(part.tensor("response_length").tolist()) <= 4
        for tokens, start in zip(part.ragged("tokens").rows(), part.tensor("prompt_length").tolist(), strict=True):
            prompt, response = tokens[:start].tolist(), tokens[start:].tolist()
            assert response == tied.logprobs(prompt, response).argmax(-1).tolist()


def test_an_empty_shard_yields_nothing(worker, requests):
    assert list(worker.generate(requests.take(np.array([], dtype=np.int64)))) == []


@pytest.mark.parametrize("transport", [PublishedMemory(), ThroughStore(100_000)])
def test_weights_come_as_planned_and_serve_once_they_are_trusted(worker, requests, tied, transport):
    other, probe, store = tied.perturbed(seed=8), [3, 4, 5, 6], worker.context.store
    weights = {name: tensor.flatten() for name, tensor in other.weights().items()}
    wanted = worker.layout()
    held = build_layout([Spec(parameter) for parameter in wanted.layout.parameters], grid())
    route = plan_route([RankLayout(held, wanted.node)], [wanted], bucket_bytes=100_000)
    assert route.transport == PublishedMemory()
    offer = transport.offer(route.outgoing[0], weights, store)
    worker.take_route(route.incoming[0], transport)
    receipt = worker.receive(Delivery(1, (offer,), tuple(probe)))

    exact = other.logprobs(probe[:1], probe[1:])[torch.arange(3), probe[1:]].tolist()
    verify(route.plan, expected_checksums(route.outgoing[0], weights), exact, [receipt], tolerance=1e-4)
    with pytest.raises(WeightSyncError, match="weights of version 1 are not proven yet"):
        next(worker.generate(requests))
    assert worker.read_back((transport.offer(route.outgoing[0], weights, store),)).differences == ()
    worker.trust()
    assert set(next(worker.generate(requests)).ragged("versions").flat.tolist()) == {-1, 1}
