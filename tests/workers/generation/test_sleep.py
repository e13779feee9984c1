"""Engines give memory back, and serve again once they have new weights and their caches: both engines, one order.

vLLM on a CPU keeps its memory and the order alone is seen here; tests/gpu measures it.
"""

from typing import Any

import pytest

from hybridflow.errors import WeightSyncError
from tests.workers.generation.conftest import TinyModel
from tests.workers.generation.trainer import Trainer, incoming, receive
from workers.generation.base import Request, Sampling

PROBE = [3, 4, 5, 6]
REQUESTS = [Request(row, row // 2, [7, 8 + row], seed=row) for row in range(6)]
SAMPLING = Sampling(max_response_tokens=12)


def drawn(engine: Any) -> list[list[int]]:
    samples = [sample for group in engine.generate(REQUESTS, SAMPLING) for sample in group]
    return [sample.tokens for sample in sorted(samples, key=lambda sample: sample.index)]


@pytest.fixture
def trainer(engine: Any, tied: TinyModel) -> Any:
    """Its weights are in the engine at the beginning and at the end."""
    made = Trainer(tied.model)
    parts = incoming(made.plan(engine))
    receive(engine, 1, parts, made.publications, PROBE)
    yield made
    receive(engine, 1, parts, made.publications, PROBE)


def test_an_engine_that_slept_serves_what_it_received(engine: Any, trainer: Trainer) -> None:
    before, parts = drawn(engine), incoming(trainer.plan(engine))
    trainer.update(seed=5)
    receive(engine, 2, parts, trainer.publications, PROBE)
    updated = drawn(engine)
    assert updated != before
    trainer.update(seed=6)
    engine.pause()
    engine.sleep()
    with pytest.raises(WeightSyncError, match="is asleep; wake its weights"):
        next(engine.generate(REQUESTS, SAMPLING))
    engine.wake_weights()
    with pytest.raises(WeightSyncError, match=r"asleep|did not survive"):
        engine.resume()
    assert receive(engine, 3, parts, trainer.publications, []).probe_logprobs == []
    engine.wake_cache()
    assert engine.probe(PROBE) == pytest.approx(trainer.logprobs(PROBE), abs=1e-4)
    engine.resume()
    assert not engine.read_back(parts, trainer.publications).differences
    slept = drawn(engine)
    receive(engine, 3, parts, trainer.publications, PROBE)
    assert drawn(engine) == slept != updated


def test_weights_that_did_not_come_are_not_served(engine: Any, trainer: Trainer) -> None:
    engine.sleep()
    engine.sleep()
    engine.wake_weights()
    engine.wake_cache()
    with pytest.raises(WeightSyncError, match="did not survive the engine's sleep; send them"):
        next(engine.generate(REQUESTS, SAMPLING))


def test_weights_that_are_kept_need_not_come_again(engine: Any, trainer: Trainer) -> None:
    before = drawn(engine)
    engine.sleep(keep_weights=True)
    with pytest.raises(WeightSyncError, match="is asleep"):
        next(engine.generate(REQUESTS, SAMPLING))
    engine.wake_weights()
    engine.wake_cache()
    assert drawn(engine) == before


def test_hugging_face_weights_are_really_away(hf_engine: Any, tied: TinyModel) -> None:
    trainer = Trainer(tied.model)
    parts = incoming(trainer.plan(hf_engine))
    hf_engine.sleep()
    assert sum(parameter.untyped_storage().nbytes() for parameter in hf_engine._model.parameters()) == 0
    hf_engine.wake_weights()
    receive(hf_engine, 1, parts, trainer.publications, PROBE)
    assert not hf_engine.read_back(parts, trainer.publications).differences
