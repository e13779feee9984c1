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
