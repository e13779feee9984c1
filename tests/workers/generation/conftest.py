"""Tiny models with their own independent oracle, and one engine of each kind for the whole session."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

END_OF_CONFIG, END_OF_GENERATION_CONFIG = 1, 5
VOCABULARY = 82


@dataclass
class TinyModel:
    """A saved model folder, and the same model in this process to compare with."""

    folder: Path
    model: Any

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def logprobs(self, prompt: list[int], response: list[int], temperature: float = 1.0) -> torch.Tensor:
        """(len(response), V) float64, by one plain forward pass."""
        with torch.no_grad():
            logits_TV = self.model(torch.tensor([[*prompt, *response]])).logits[0]
        return (logits_TV[len(prompt) - 1 : -1].double() / temperature).log_softmax(-1)

    def perturbed(self, seed: int) -> "TinyModel":
        """The same architecture with other weights."""
        other = copy.deepcopy(self.model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        return TinyModel(self.folder, other)


def save_folder(folder: Path, kind: str, **sizes: Any) -> Any:
    """A random model of `kind` (Qwen2, Llama, Mixtral), saved; small in all that `sizes` does not say."""
    import transformers

    torch.manual_seed(3)
    small = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    end = {"eos_token_id": END_OF_CONFIG, "initializer_range": 0.08}
    config = getattr(transformers, f"{kind}Config")(**{**small, **heads, **end, **sizes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at the start, which would hide a lost one
                parameter.normal_(std=0.05)
    model.generation_config.eos_token_id = [END_OF_CONFIG, END_OF_GENERATION_CONFIG]
    model.save_pretrained(folder)
    return model


def make_tiny(folder: Path, tied: bool) -> TinyModel:
    return TinyModel(folder, save_folder(folder, "Qwen2", tie_word_embeddings=tied))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """As ranks have it: beside an engine, spinning threads cost ten times what they win."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="session")
def hf_engine(tied: TinyModel) -> Any:
    from workers.generation.hf_engine import HfEngine
    from workers.generation.settings import RolloutSettings

    return HfEngine(tied.folder, RolloutSettings(engine="hf", max_num_seqs=64))


@pytest.fixture(scope="session")
def vllm_engine(tied: TinyModel) -> Iterator[Any]:
    pytest.importorskip("vllm", reason="vLLM is an optional extra")
    from workers.generation.settings import RolloutSettings
    from workers.generation.vllm_engine import VllmEngine

    engine = VllmEngine(tied.folder, RolloutSettings(kv_cache_gib=0.1, max_num_seqs=32))
    yield engine
    engine.shutdown()


@pytest.fixture(scope="session")
def cut_engine(untied: TinyModel) -> Iterator[Any]:
    """Two tensor-parallel workers."""
    yield from _cut_engine(untied.folder)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder = tmp_path_factory.mktemp("llama")
    return TinyModel(folder, save_folder(folder, "Llama", tie_word_embeddings=False))


@pytest.fixture(scope="session")
def llama_engine(llama: TinyModel) -> Iterator[Any]:
    yield from _cut_engine(llama.folder, num_ranks=1)


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder = tmp_path_factory.mktemp("mixture")
    return TinyModel(folder, save_folder(folder, "Mixtral", num_local_experts=4))


@pytest.fixture(scope="session")
def mixture_engine(mixture: TinyModel) -> Iterator[Any]:
    """Two tensor-parallel workers, each with half of every expert."""
    yield from _cut_engine(mixture.folder)


def _cut_engine(folder: Path, num_ranks: int = 2) -> Iterator[Any]:
    pytest.importorskip("vllm", reason="vLLM is an optional extra")
    from workers.generation.settings import RolloutSettings
    from workers.generation.vllm_engine import VllmEngine

    engine = VllmEngine(folder, RolloutSettings(kv_cache_gib=0.1, max_num_seqs=8, tensor_parallel_size=num_ranks))
    yield engine
    engine.shutdown()


@pytest.fixture(params=["vllm", "hf"])
def engine(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(f"{request.param}_engine")
