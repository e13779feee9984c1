"""The reward's rank: what it writes for samples that it could not score, and where one reads why."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from hybridflow import columns
from hybridflow.batch import Batch, Ragged
from hybridflow.batch_ref import BatchRef
from hybridflow.controller.coordinates import Shape
from hybridflow.controller.local_runtime import LocalRuntime
from hybridflow.data.tokenizers import load_tokenizer
from hybridflow.errors import ConfigError
from hybridflow.rewards.settings import RewardSettings
from workers.reward import RewardWorker
from workers.reward_model import RewardModelWorker
from workers.training.settings import EngineSettings

MINE = """
from hybridflow.rewards.functions import ABSTAIN

def score(prompt, response, answer, **row):
    return ABSTAIN if response == "?" else {"1": 1.0, "2": 0.5}[response]
"""


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[LocalRuntime]:
    made = LocalRuntime(tmp_path / "run")
    yield made
    made.shutdown()


def sampled(runtime: LocalRuntime, *responses: str) -> BatchRef:
    """Rows as a rollout leaves them: prompt `1+1=`, then the response."""
    tokenizer = load_tokenizer("char")
    prompt, count = tokenizer.encode("1+1="), len(responses)
    tokens = [prompt + tokenizer.encode(response) for response in responses]
    rows = Batch(
        {
            "tokens": Ragged.from_rows(tokens, torch.int64),
            "versions": Ragged.from_rows([[0] * len(row) for row in tokens], torch.int32),
            "prompt": ["1+1="] * count,
            "answer": ["2"] * count,
            "prompt_length": torch.full((count,), len(prompt)),
            "group": torch.zeros(count, dtype=torch.int64),
            "sample": torch.arange(count),
            "truncated": torch.zeros(count, dtype=torch.bool),
        }
    )
    return BatchRef.put(rows, runtime.store)


def test_a_failed_sample_says_why_in_its_column_the_log_and_the_record(
    runtime: LocalRuntime, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    settings = RewardSettings(function=f"{tmp_path / 'mine.py'}:score")
    worker = partial(RewardWorker, settings=settings, tokenizer="char")
    group = runtime.group("reward", worker, runtime.pool("reward"), Shape())
    rows = sampled(runtime, "1", "3", "?", "4", "2")
    scored = rows.union(group.score(rows).result())
    assert scored.scalar("rewards").tolist() == [1.0, 0.0, 0.0, 0.0, 0.5]
    assert scored.scalar("failed").tolist() == [False, True, False, True, False]
    assert scored.scalar("abstained").tolist() == [False, True, True, True, False]
    assert "2 of this rank's 5 samples failed; the first:" in caplog.text and "KeyError: '3'" in caplog.text

    group.record(scored, 7).result()
    lines = [json.loads(line) for line in (tmp_path / "run/samples/step-000007.jsonl").read_text().splitlines()]
    assert [line["failed"] for line in lines] == [False, True, False, True, False]
    assert [line["reward"] for line in lines] == [1.0, None, None, None, 0.5]
    assert "KeyError: '3'" in lines[1]["failure"] and "KeyError: '4'" in lines[3]["failure"]
    assert [lines[k]["failure"] for k in (0, 2, 4)] == [""] * 3


def test_a_frozen_reward_model_without_a_head_is_refused(tmp_path: Path) -> None:
    context = type("Context", (), {"name": "cost"})()
    with pytest.raises(ConfigError, match=r"cost: found '.*', which has no value_head.safetensors: a new head scores"):
        RewardModelWorker(context, str(tmp_path), EngineSettings(), "char")


def test_a_reward_model_writes_the_same_columns(runtime: LocalRuntime) -> None:
    class Scores:
        """An engine whose score of a text is its length."""

        def forward(self, rows: Batch, outputs: tuple[str, ...], temperature: float) -> dict[str, Ragged]:
            tokens = rows.ragged("tokens")
            counted = [torch.arange(1, len(row) + 1, dtype=torch.float32) for row in tokens.rows()]
            return {"scores": Ragged.from_rows(counted, torch.float32)}

    worker = RewardModelWorker.__new__(RewardModelWorker)
    rows = sampled(runtime, "1", "33")
    worker.engine = Scores()
    worker.context = type("Context", (), {"store": runtime.store})()
    written = worker.score(rows)
    assert written.tensor("rewards").tolist() == [5.0, 6.0]
    assert set(written) == {"rewards", "abstained", "failed", "failure"}
    assert all(columns.spec(name) for name in written)
    assert written.tensor("failed").tolist() == [False, False] and written.objects("failure") == ["", ""]
