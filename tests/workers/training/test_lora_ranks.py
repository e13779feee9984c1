"""An adapter under DeepSpeed on one and on two real gloo ranks, started once for the module (see `lora_ranks.py`)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rank_processes import run_ranks

Results = dict[str, dict[str, float]]
HERE = Path(__file__).parent


def start(folder: Path, ranks: int) -> list[Results]:
    """What each rank found."""
    run_ranks(HERE / "lora_ranks.py", ranks, folder, ranks)
    return [json.loads((folder / f"result-{ranks}-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def results(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Results]]:
    folder = tmp_path_factory.mktemp("ranks")
    shutil.copytree(model_folder(num_hidden_layers=1), folder / "model")
    return {ranks: start(folder, ranks) for ranks in (1, 2)}


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        *((ranks, f"torch {stage}") for ranks in (1, 2) for stage in range(4)),
        (2, "critic 2"),
        (2, "critic 3"),
        (2, "one output 3"),
    ],
)
def test_gradients_and_weights_equal_those_of_plain_torch(
    results: dict[int, list[Results]], ranks: int, name: str
) -> None:
    for found in results[ranks]:
        assert max(found[name].values()) <= 1e-6, found[name]


@pytest.mark.parametrize("stage", [2, 3])
def test_the_reference_is_the_base_model(results: dict[int, list[Results]], stage: int) -> None:
    for found in results[2]:
        assert found[f"reference {stage}"]["reference"] <= 1e-6
        assert found[f"reference {stage}"]["moved"] > 1e-3


@pytest.mark.parametrize("case", [*(f"{stage} float32" for stage in range(4)), *(f"{s} bfloat16" for s in (1, 2, 3))])
def test_resume_is_exact_from_a_checkpoint_without_frozen_weights(results: dict[int, list[Results]], case: str) -> None:
    for found in results[2]:
        assert found[f"resume {case}"] == {"weights": 0, "frozen in checkpoint": 0, "another adapter refused": 1}


@pytest.mark.parametrize("stage", [2, 3])
def test_export_is_whole(results: dict[int, list[Results]], stage: int) -> None:
    for found in results[2]:
        assert max(found[f"export {stage}"].values()) <= 1e-6
