import pytest
import torch

from hybridflow.resharding.weights import ALIGNMENT, fill, lay_out, unpack


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(7, 5, generator=generator),
        "a.bias": torch.randn(3, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "transposed": torch.randn(4, 6, generator=generator).t(),
        "empty": torch.empty(0, 4),
    }


def filled(weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, tuple]:
    manifest, num_bytes = lay_out(weights.items())
    flat = torch.zeros(num_bytes, dtype=torch.uint8)
    fill(flat, manifest, weights)
    return flat, manifest


def test_what_is_filled_in_comes_out_again(weights):
    found = unpack(*filled(weights))
    assert list(found) == list(weights)
    for name, tensor in weights.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)


def test_every_tensor_is_aligned_and_unpacking_copies_nothing(weights):
    flat, manifest = filled(weights)
    assert all(entry.offset % ALIGNMENT == 0 for entry in manifest)
    unpack(flat, manifest)["a.weight"][0, 0] = 42.0
    assert flat[:4].view(torch.float32).item() == 42.0
