"""A person's file on real Ray ranks, which started in another working directory and never see it."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from hybridflow import columns, launch
from hybridflow.batch_ref import BatchRef
from hybridflow.config.load import load
from hybridflow.config.locate import import_name
from hybridflow.controller.coordinates import Shape
from hybridflow.errors import RankFailure
from hybridflow.tracking.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = """
import os
from dataclasses import dataclass
from hybridflow.batch import Batch
from hybridflow.columns import ColumnSpec, register, spec
from hybridflow.controller.dispatch import dispatch
from hybridflow.controller.worker import Worker

FACTOR = 3
register(ColumnSpec("tripled", "row", "int64", "mine", "three times the key"))


def scaled(values):
    return values * FACTOR


@dataclass(frozen=True)
class Times:
    factor: int
    columns: tuple = ("key",)

    def __call__(self, batch):
        return Batch({"tripled": scaled(batch.tensor("key")) * self.factor})


class Mine(Worker):
    @dispatch("ONE_TO_ALL")
    def facts(self):
        return os.getcwd(), os.path.exists(__file__), spec("tripled") is not None, Times(2)

    @dispatch("ONE_TO_ALL")
    def fails(self):
        raise LookupError("of the plug-in")  # its own line
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_ray_runtime) -> Path:
    """The driver's folder; the cluster's processes have another."""
    folder = tmp_path / "driver"
    (folder / "mine").mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def test_a_file_that_is_gone_runs_on_ranks(elsewhere: Path, make_ray_runtime) -> None:
    """A worker class, a function for `compute` with a helper and a constant of its module, and what it registers."""
    (elsewhere / "mine/plug.py").write_text(PLUGIN)
    mine, times = (import_name(f"mine/plug.py:{name}") for name in ("Mine", "Times"))
    (elsewhere / "mine/plug.py").unlink()
    runtime = make_ray_runtime()
    group = runtime.group("mine", mine, runtime.pool("mine", 2, cpus_per_bundle=0.1), Shape(data=2))
    runtime.ready([group])
    for place, is_there, registered, made in group.facts().result():
        assert place != os.getcwd() and not is_there and registered
        assert made == times(2) and type(made) is times
    rows = BatchRef(5, {}, {"key": np.arange(5)})
    assert group.compute(times(2), rows).result().scalar("tripled").tolist() == [0, 6, 12, 18, 24]
    with pytest.raises(RankFailure, match="LookupError: of the plug-in") as caught:
        group.fails().result()
    assert "# its own line" in str(caught.value)
    assert columns.spec("tripled") is not None


EXAMPLES = {
    "custom_algorithm": (["algorithm=veto", "algorithm.target=mine/plug.py:Veto", "algorithm.least_logprob=-100"],
                         "veto.py", {"actor/nll", "timing_s/judge_logprobs"}),
    "custom_loss": (["algorithm=topr", "algorithm.target=mine/plug.py:TOPR"],
                    "topr.py", {"actor/pg_loss", "actor/ppo_kl"}),
}  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_train_on_ray(example: str, elsewhere: Path) -> None:
    """Copied to where no rank looks, with a reward beside it; three steps, whose metrics move."""
    given, file, logged = EXAMPLES[example]
    reward = "\n\ndef score(prompt, response, answer, **row):\n    return float(len(response))\n"
    (elsewhere / "mine/plug.py").write_text((ROOT / "examples" / example / file).read_text() + reward)
    config = load(
        [*given, "algorithm.samples_per_prompt=2", "reward=function", "reward.function=mine/plug.py:score",
         "runtime=ray", "engine=torch", "rollout=hf", "placement=single", "placement.pools.all.cpus_per_rank=0.5",
         "model.config.hidden_size=32", "model.config.intermediate_size=64", "model.config.num_hidden_layers=1",
         "trainer.steps=3", "trainer.prompts_per_step=4", "trainer.export=false", "tracking.console=false",
         "engine.optimizer.lr=1e-2", "rollout.sampling.max_response_tokens=8", f"run_folder={elsewhere / 'run'}"],
        ROOT / "examples" / example / "conf",
    )  # fmt: skip
    assert launch.run(config) == 0
    samples = (RunFolder(elsewhere / "run").path / "samples/step-000003.jsonl").read_text().splitlines()
    assert len(samples) == 8
    lines = (elsewhere / "run/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["metrics"] for line in lines]
    assert len(steps) == 3 and all(logged <= metrics.keys() for metrics in steps)
    assert len({metrics["actor/loss"] for metrics in steps}) == 3
    assert all(math.isfinite(value) for metrics in steps for value in metrics.values())
