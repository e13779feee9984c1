"""DeepSpeed on two real gloo ranks, started once for the module (see `training_ranks.py`)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rank_processes import run_ranks

Results = dict[str, dict[str, float]]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    shutil.copytree(model_folder(), folder / "model")
    run_ranks(HERE / "training_ranks.py", 2, folder)
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", ["torch rank without rows", *(f"rank without rows {stage}" for stage in range(4))])
def test_a_rank_without_rows_takes_part_and_the_group_equals_one_rank(results: list[Results], name: str) -> None:
    for rank in results:
        assert rank[name]["forward"] <= 1e-5
        assert rank[name]["weights"] <= 1e-5
        assert rank[name]["names"] == 1
    assert results[0][name]["loss"] == 0 != results[1][name]["loss"]


@pytest.mark.parametrize("stage", range(4))
def test_a_bad_row_on_one_rank_is_refused_on_both_and_leaves_no_trace(results: list[Results], stage: int) -> None:
    for rank in results:
        assert rank[f"not finite {stage}"] == {"refused": 1.0, "weights": 0.0}


@pytest.mark.parametrize("case", [*(f"{stage} float32" for stage in range(4)), "1 bfloat16"])
def test_resume_is_exact(results: list[Results], case: str) -> None:
    for rank in results:
        found = rank[f"resume {case}"]
        assert found["weights"] == 0
        assert found["rng"] == 1
        assert found["lr"] == pytest.approx(1e-2 * 8 / 9)
        assert found["other stage refused"] == 1


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_has_float32_masters_that_keep_tiny_updates(results: list[Results], stage: int) -> None:
    for rank in results:
        found = rank[f"bfloat16 {stage}"]
        assert found["bfloat16"] == 1
        assert found["first"] == 0  # one step of 2e-4 is lost in bfloat16 at 1
        assert found["last"] >= 2**-8  # forty add up


@pytest.mark.parametrize(
    "name", ["activation checkpointing 3", "head in chunks 3", "offload 2", "critic 1", "critic 3"]
)
def test_options_do_not_change_the_weights(results: list[Results], name: str) -> None:
    assert max(rank[name]["weights"] for rank in results) <= 1e-5
