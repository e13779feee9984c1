"""Tensor parallelism on two real gloo ranks, started once for the module (see `tensor_ranks.py`), and what is refused.

Gradients, weights and log-probs over all shapes and ZeRO stages: `test_zero_equivalence.py`.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from training_samples import GPT2, QWEN2

from hybridflow.controller.coordinates import Coordinates, Shape
from hybridflow.errors import HybridFlowError
from tests.rank_processes import run_ranks
from workers.training.factory import build_engine
from workers.training.settings import EngineSettings

Results = dict[str, dict[str, float]]
HERE = Path(__file__).parent
LLAMA = {**QWEN2, "model_type": "llama", "tie_word_embeddings": False}
QWEN3 = {**QWEN2, "model_type": "qwen3", "head_dim": 8}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 2}


@pytest.fixture(scope="module")
def results(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, config in (("qwen2", QWEN2), ("llama", LLAMA), ("qwen3", QWEN3)):
        shutil.copytree(model_folder(config), folder / name)
    run_ranks(HERE / "tensor_ranks.py", 2, folder)
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    "case", ["llama 2", "qwen3 0", "qwen3 3", "checkpointing 1", "chunks 3", "critic 0", "critic 3"]
)
def test_two_tensor_ranks_train_as_one_rank(results: list[Results], case: str) -> None:
    """With active clipping: every rank must find the norm of the whole model."""
    for rank in results:
        found = rank[f"equal {case}"]
        assert found["forward"] <= 5e-6
        assert found["weights"] <= 1e-5
        assert found["norm"] <= 1e-5
        assert found["clipped"] == found["names"] == 1


@pytest.mark.parametrize(("case", "tolerance"), [("float32", 5e-6), ("reward", 5e-6), ("bfloat16", 0.05)])
def test_a_frozen_model_is_divided_over_tensor_ranks(results: list[Results], case: str, tolerance: float) -> None:
    for rank in results:
        found = rank[f"frozen {case}"]
        assert found["forward"] <= tolerance
        assert found["share"] < 0.6
        assert found["trains"] == 0


@pytest.mark.parametrize("stage", range(4))
def test_a_bad_row_is_refused_and_leaves_no_trace(results: list[Results], stage: int) -> None:
    for rank in results:
        assert rank[f"not finite {stage}"] == {"refused": 1, "weights": 0}


@pytest.mark.parametrize("case", [*(f"{stage} float32" for stage in range(4)), "1 bfloat16"])
def test_resume_is_exact(results: list[Results], case: str) -> None:
    for rank in results:
        assert rank[f"resume {case}"] == {"weights": 0, "other shape refused": 1}


@pytest.mark.parametrize("stage", [1, 3])
def test_export_is_whole(results: list[Results], stage: int) -> None:
    for rank in results:
        assert rank[f"export {stage}"] == {"weights": 0}


def test_a_second_tensor_size_in_one_process_is_refused(results: list[Results]) -> None:
    assert all(rank["second size"] == {"refused": 1} for rank in results)


def build(folder: Path, tensor: int, trainable: bool = True, **settings: object) -> None:
    at = Coordinates(0, Shape(tensor=tensor))
    build_engine(folder, EngineSettings.model_validate(settings), at, kind="causal_lm", trainable=trainable)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize(
    ("config", "tensor", "text"),
    [
        (QWEN2, 4, r"tensor=4: does not divide.*num_key_value_heads=2.*allowed: \[1, 2\]"),
        ({**QWEN2, "num_key_value_heads": 4, "intermediate_size": 46}, 4, r"mlp.gate_proj=46.*allowed: \[1, 2\]"),
        (GPT2, 2, "GPT2LMHeadModel cannot be cut: it has transformer.wte.weight.*Set tensor=1"),
        (MIXTRAL, 2, "MixtralForCausalLM cannot be cut: it has .*experts"),
    ],
)
def test_sizes_and_models_that_cannot_be_cut_are_refused(
    model_folder: Callable[..., Path], config: dict, tensor: int, text: str, trainable: bool
) -> None:
    with pytest.raises(HybridFlowError, match=text):
        build(model_folder(config), tensor, trainable)


def test_what_does_not_go_with_tensor_ranks_is_refused(model_folder: Callable[..., Path]) -> None:
    with pytest.raises(HybridFlowError, match=r"engine.lora: is set, and tensor=2.*lora=null"):
        build(model_folder(), 2, lora={"rank": 2})
    with pytest.raises(HybridFlowError, match=r"engine.compile.*compile=false"):
        build(model_folder(), 2, compile=True)
    with pytest.raises(HybridFlowError, match=r"engine=torch: found tensor=2.*engine=deepspeed"):
        build(model_folder(), 2, name="torch")
    with pytest.raises(HybridFlowError, match="pipeline=2"):
        at = Coordinates(0, Shape(pipeline=2))
        build_engine(model_folder(), EngineSettings(), at, kind="causal_lm", trainable=True)
