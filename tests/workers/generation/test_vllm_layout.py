"""What vLLM's own loaders take of each parameter, against the layout from the config's numbers alone."""

import pytest
import torch

from hybridflow.resharding.decoder import Decoder, EngineCuts, decoder_specs
from hybridflow.resharding.shards import build_layout, grid
from tests.workers.generation.conftest import VOCABULARY, save_folder
from tests.workers.generation.trainer import slices

pytest.importorskip("vllm", reason="vLLM is an optional extra")

VLLM = EngineCuts(vocabulary_multiple=64, cut_experts=True)


def numbers(tensor: int, **sizes) -> dict:
    model = Decoder(VOCABULARY, 128, 192, 1, **{"num_heads": 4, "num_kv_heads": 2, "head_size": 32, **sizes})
    return slices(build_layout(decoder_specs(model, VLLM), grid(tensor=tensor)))


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("Qwen2", {"qkv_bias": True}),
        ("Llama", {}),
        ("Llama", {"num_kv_heads": 1}),  # fewer heads than ranks: neighbours hold the same one
        ("Mixtral", {"num_experts": 4}),
    ],
)
def test_loaders_take_the_slices_that_the_numbers_say(tmp_path, kind, sizes, tensor):
    from tests.workers.generation.unstarted_vllm import unstarted_layout

    more = {"num_local_experts": sizes["num_experts"]} if "num_experts" in sizes else {}
    save_folder(tmp_path, kind, num_key_value_heads=sizes.get("num_kv_heads", 2), num_hidden_layers=1, **more)
    found = unstarted_layout(tmp_path, tensor)
    found.check_written_once()
    assert slices(found) == numbers(tensor, **sizes)


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize(
    ("kind", "sizes", "spread"),
    [
        ("Qwen2", {}, set()),
        ("Llama", {"num_key_value_heads": 1}, set()),
        ("Mixtral", {"num_local_experts": 4}, {"model.layers.0.mlp.experts.gate_up_proj"}),
    ],
)
def test_what_a_rank_is_sent_lies_in_its_layers_as_it_is(tmp_path, kind, sizes, spread, tensor):
    """Columns too; so nothing needs memory beside the layer. But a rank's gate and up rows alternate from expert to
    expert in vLLM's parameter, and come one after the other."""
    from tests.workers.generation.unstarted_vllm import unstarted_loads
    from workers.generation.model_folder import weight_shapes
    from workers.generation.vllm_stream import Destinations

    save_folder(tmp_path, kind, num_hidden_layers=1, **sizes)
    shapes = weight_shapes(tmp_path)
    for rank in range(tensor):
        found = Destinations(unstarted_loads(tmp_path, shapes, rank, tensor), shapes)
        assert {name for name, at in found.in_place.items() if at is None} == (spread if tensor > 1 else set())
        empty = {"model.embed_tokens.weight", "lm_head.weight"} if tensor == 4 and rank == 3 else set()
        assert shapes.keys() - found.targets.keys() == empty  # a vocabulary of 82 ends in the third quarter of 128
        if kind == "Qwen2" and tensor == 2:
            qkv = "model.layers.0.self_attn.{}_proj.{}"
            rows = [found.in_place[qkv.format(kind, "bias")] for kind in "qkv"]
            assert rows == [0, 64, 96]
            assert [found.in_place[qkv.format(kind, "weight")] for kind in "qkv"] == [128 * row for row in rows]


def test_a_loader_that_computes_is_refused():
    """Here one that transposes into new memory and adds; the error names what it was about to copy."""
    from hybridflow.errors import WeightSyncError
    from workers.generation.vllm_loaders import _Recorder

    weight, held = torch.empty(4, 4, device="meta"), torch.empty(4, 4)
    with (
        pytest.raises(WeightSyncError, match=r"loader of q copies \(4, 4\) of a tensor that it computed"),
        _Recorder({"w": weight}, {"q": held}),
    ):
        held.copy_(weight + 1)
    with _Recorder({"w": weight}, {"q": held}) as recorder:
        held[:2].copy_(weight.narrow(1, 0, 2).t())
    (load,) = recorder.loads
    assert (load.parameter, load.held, load.source, load.place) == ("w", "q", (0, (2, 4), (1, 4)), (0, (2, 4), (4, 1)))
