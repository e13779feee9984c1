"""Layouts of live engines on real gloo ranks (see `layout_ranks.py`): put together by a plan, they are the weights."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import layout_ranks
import pytest
import torch
from training_samples import QWEN2

from hybridflow.controller.coordinates import Coordinates, Shape
from hybridflow.errors import WeightSyncError
from hybridflow.resharding.cuts import shard
from hybridflow.resharding.decoder import Decoder, decoder_specs
from hybridflow.resharding.layout import Layout, LayoutBuilder, Parameter, combined
from hybridflow.resharding.plan import make_plan, validate
from hybridflow.resharding.shards import Zero, build_layout, grid
from hybridflow.resharding.transfer import execute_here
from tests.rank_processes import run_ranks
from workers.training.factory import build_engine
from workers.training.settings import EngineSettings

HERE = Path(__file__).parent
LLAMA = {**QWEN2, "model_type": "llama", "tie_word_embeddings": False}
SHAPES = [(1, 1), (1, 2), (2, 2)]


def start(folder: Path, tensor: int, data: int) -> list[dict[str, Any]]:
    run_ranks(HERE / "layout_ranks.py", tensor * data, folder, tensor, data, timeout_s=550)
    ranks = range(tensor * data)
    return [json.loads((folder / f"result-{tensor}x{data}-{rank}.json").read_text()) for rank in ranks]


@dataclass
class Written:
    """The ranks' files; those of a shape are made when first read, so that no test waits for all."""

    folder: Path
    found: dict[tuple[int, int], list[dict[str, Any]]] = field(default_factory=dict)

    def results(self, shape: tuple[int, int]) -> list[dict[str, Any]]:
        """What each rank found about shared memory."""
        if shape not in self.found:
            self.found[shape] = start(self.folder, *shape)
        return self.found[shape]

    def read(self, name: str, shape: tuple[int, int]) -> list[dict[str, Any]]:
        """Each rank's layout, storages and full weights."""
        ranks = range(len(self.results(shape)))
        files = [self.folder / f"{name}-{shape[0]}x{shape[1]}-{rank}.pt" for rank in ranks]
        return [torch.load(file, weights_only=False) for file in files]


@pytest.fixture(scope="module")
def written(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("ranks")
    shutil.copytree(model_folder(), folder / "qwen2")
    shutil.copytree(model_folder(LLAMA), folder / "llama")
    return Written(folder)


def one_rank(parameters: tuple[Parameter, ...]) -> Layout:
    builder = LayoutBuilder(parameters)
    for parameter in parameters:
        builder.open(0, parameter.name, parameter.dtype)
        builder.append(parameter.name, shard(parameter.name, parameter.shape, (), {}))
        builder.close()
    return builder.build([0])


def id_of(value: object) -> str | None:
    return f"{value[0]}x{value[1]}" if isinstance(value, tuple) else None


def all_cases() -> list[tuple[str, tuple[int, int]]]:
    return [(case[0], shape) for shape in SHAPES for case in layout_ranks.cases(*shape)]


@pytest.mark.parametrize(("name", "shape"), all_cases(), ids=id_of)
def test_storages_of_all_ranks_make_the_full_weights(written: Written, name: str, shape: tuple[int, int]) -> None:
    ranks = written.read(name, shape)
    assert [found["layout"].ranks for found in ranks] == [(rank,) for rank in range(len(ranks))]
    source = combined([found["layout"] for found in ranks])
    assert {p.name: p.shape for p in source.parameters} == {n: tuple(t.shape) for n, t in ranks[0]["state"].items()}
    destination = one_rank(source.parameters)
    plan = make_plan(source, destination)
    validate(plan)
    full = destination.allocate(0)
    execute_here(plan, {rank: found["storages"] for rank, found in enumerate(ranks)}, {0: full})
    for found in ranks:
        for key, tensor in found["state"].items():
            assert torch.equal(full[key].view(tensor.shape), tensor), key


@pytest.mark.parametrize("shape", SHAPES, ids=id_of)
@pytest.mark.parametrize("model", ["qwen2", "llama"])
def test_parameters_are_those_of_the_decoder_from_numbers(written: Written, model: str, shape: tuple[int, int]) -> None:
    """lm_head.weight too, where it is tied."""
    numbers = Decoder(37, 32, 48, 2, 4, 2, 8, qkv_bias=model == "qwen2")
    expected = {spec.parameter for spec in decoder_specs(numbers)}
    for stage in range(4):
        for found in written.read(f"{model}-{stage}", shape):
            assert set(found["layout"].parameters) == expected


def test_zero_3_partitions_are_those_from_numbers(written: Written) -> None:
    """So `hybridflow check` counts the bytes that a rank really holds."""
    for shape in SHAPES:
        ranks = written.read("llama-3", shape)
        specs = decoder_specs(Decoder(37, 32, 48, 2, 4, 2, 8))
        numbers = build_layout(specs, grid(tensor=shape[0], data=shape[1]), Zero(3))
        found = combined([rank["layout"] for rank in ranks])
        assert found.bytes_per_rank() == numbers.bytes_per_rank()
        assert set(found.storages) == set(numbers.storages)


def test_tensor_ranks_hold_their_cuts_alone(written: Written) -> None:
    """Nothing that is cut is held whole, so no rank reads more than its share of the layers."""
    for stage in (0, 3):
        layout = combined([found["layout"] for found in written.read(f"llama-{stage}", (2, 2))])
        pieces = layout.pieces
        for rank in range(4):
            mine = (pieces.rank == rank) & (pieces.parameter == layout.index_of["model.layers.1.mlp.down_proj.weight"])
            columns = {*pieces.low[mine, 1].tolist(), *pieces.high[mine, 1].tolist()}
            assert min(columns) == 24 * (rank % 2)
            assert max(columns) == 24 * (rank % 2) + 24


@pytest.mark.parametrize(
    ("shape", "stage"),
    [(shape, stage) for shape in SHAPES for stage in layout_ranks.shared_stages(*shape)],
    ids=id_of,
)
def test_weights_in_shared_memory_go_on_being_trained(
    written: Written, shape: tuple[int, int], stage: int | None
) -> None:
    for found in written.results(shape):
        assert found[f"share-{stage}"] == {"equal": 1, "seen": 1, "moved": 1}


def test_tied_names_share_their_memory_and_a_frozen_model_has_a_layout(model_folder: Callable[..., Path]) -> None:
    settings = EngineSettings.model_validate({"name": "torch"})
    engine = build_engine(model_folder(), settings, Coordinates(0, Shape()), kind="causal_lm", trainable=False)
    storages = engine.storages()
    assert storages["lm_head.weight"].data_ptr() == storages["model.embed_tokens.weight"].data_ptr()
    assert list(engine.layout().index_of) == list(storages)


def test_a_partition_in_another_form_is_refused(model_folder: Callable[..., Path]) -> None:
    """Such as a quantised one, which DeepSpeed keeps in the same place."""
    settings = EngineSettings.model_validate({"name": "torch"})
    engine = build_engine(model_folder(), settings, Coordinates(0, Shape()), kind="causal_lm", trainable=False)
    weight: Any = engine.scorer.hf.model.norm.weight  # type: ignore[attr-defined]
    weight.ds_shape, weight.ds_tensor = weight.shape, torch.zeros(32, dtype=torch.int8)
    with pytest.raises(WeightSyncError, match=r"rank 0, model.norm.weight.*int8.*zero_quantized_weights"):
        engine.layout()
