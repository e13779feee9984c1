"""Any Hugging Face causal language model as a policy, or with a value head as a critic."""

import workers.training.device  # noqa: F401, I001 (before transformers: it sets DeepSpeed's accelerator)

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hybridflow.config.model_paths import VALUE_HEAD_FILE
from hybridflow.errors import ConfigError, HybridFlowError, did_you_mean
from workers.training.logprobs import TokenHead
from workers.training.settings import EngineSettings, LoraSettings

if TYPE_CHECKING:
    from workers.training.lora import Adapter

ModelKind = Literal["causal_lm", "critic", "reward_model"]
VALUE_HEAD_PREFIX = "value_head."
ADAPTER_FOLDER = "adapter"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def initialise(config: Mapping[str, Any], folder: Path, seed: int, tokenizer: Any = None) -> None:
    """Write a randomly initialised float32 causal language model (and the tokenizer) in Hugging Face format.

    `config`: `model_type` and the fields of that type's configuration class. What it leaves out of `vocab_size`,
    `bos_token_id`, `eos_token_id` and `pad_token_id` comes from the tokenizer. The weights are a function of `seed`.
    Raises ConfigError for an unknown model type.
    """
    fields = dict(config)
    model_type = fields.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        near = did_you_mean(str(model_type), list(CONFIG_MAPPING.keys()))
        raise ConfigError(f"model.config.model_type: found {model_type!r}, which transformers does not know{near}")
    if tokenizer is not None:
        fields.setdefault("vocab_size", len(tokenizer))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            fields.setdefault(name, getattr(tokenizer, name))
    model_config = AutoConfig.for_model(model_type, **fields)
    if tokenizer is not None and model_config.vocab_size < len(tokenizer):
        raise ConfigError(
            f"model.config.vocab_size: found {model_config.vocab_size}, but the tokenizer has {len(tokenizer)} tokens; "
            "leave it out or raise it"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


class Scorer(nn.Module):
    """Tokens in, outputs at chosen positions out. `backbone` gives hidden states; the subclass says what is read there.

    `hf` is the whole Hugging Face model, whose names the weights keep. Layers never drop anything out. `adapter`: what
    trains in place of `hf`'s own weights, None where those train.
    """

    hf: PreTrainedModel
    provides: tuple[str, ...]
    task: ClassVar[str] = "FEATURE_EXTRACTION"
    """peft's name of what the model is for."""

    def __init__(self, hf: PreTrainedModel, settings: EngineSettings, saved_config: Any) -> None:
        super().__init__()
        self.hf = hf
        self.saved_config = saved_config
        self.adapter: Adapter | None = None
        self.eval()
        if settings.activation_checkpointing:
            self._checkpoint_layers()

    def _layers(self, setting: str) -> list[nn.Module]:
        layers = [module for module in self.hf.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise ConfigError(f"{setting}=true: {type(self.hf).__name__} does not support it; set it to false")
        return layers

    def compile_layers(self) -> None:
        """Layer by layer: equal layers share one compilation, a quarter of the whole backbone's time at four layers."""
        for layer in self._layers("compile"):
            layer.compile(dynamic=True)

    def _checkpoint_layers(self) -> None:
        self.hf.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in self._layers("activation_checkpointing"):
            layer.training = True  # layers recompute only in training mode; their children stay in eval mode

    def train(self, mode: bool = True) -> "Scorer":
        """Modes are fixed at load: an engine's train() or eval() changes none."""
        return self if mode else super().train(False)

    def hidden_at(self, tokens_BT: Tensor, index_N: Tensor) -> Tensor:
        """Hidden states (N, D) at flat slots `index_N`; the state that predicts a token is that of the slot before."""
        hidden_BTD = self.backbone(input_ids=tokens_BT, use_cache=False).last_hidden_state
        return hidden_BTD.flatten(0, 1).index_select(0, index_N)

    @property
    def backbone(self) -> nn.Module:
        return self.hf.get_decoder()

    def add_adapter(self, settings: LoraSettings, folder: Path) -> None:
        """Freezes `hf`, which is that of `folder`, and trains an adapter beside it. See `workers.training.lora`."""
        from workers.training.lora import Adapter  # only now: peft takes its time to import

        self.adapter = Adapter(self.hf, settings, folder, self.task)
        self.register_state_dict_post_hook(_leave_out_frozen)

    def named_tensors(self) -> dict[str, Tensor]:
        """Live tensors under the names of the module tree, tied ones under each of their names."""
        return dict(self.hf.state_dict(keep_vars=True))

    def weights(self) -> dict[str, Tensor]:
        """Live tensors under Hugging Face names, tied ones under each of their names. An adapter is merged into new
        tensors, so that the names and shapes are those of the model without one."""
        found = self.named_tensors()
        return self.adapter.merged(found) if self.adapter else found

    def live(self) -> dict[str, Tensor]:
        """What `weights` is made of, as live tensors: an adapter's A and B are beside the weights."""
        found = self.named_tensors()
        return self.adapter.named(found) if self.adapter else found

    def adapter_weights(self) -> dict[str, Tensor]:
        """The live tensors of the adapter under peft's names; empty where there is none."""
        return self.adapter.tensors() if self.adapter else {}

    @property
    def vocab_size(self) -> int:
        return self.hf.config.get_text_config().vocab_size

    def trailing(self, output: str) -> tuple[int, ...]:
        """The shape of an output at one position: () for a number."""
        return ()

    def check(self, outputs: Sequence[str]) -> None:
        wrong = [name for name in outputs if name not in self.provides]
        if wrong:
            raise HybridFlowError(f"{type(self).__name__} gives {', '.join(self.provides)}; asked for {wrong}")

    def export(self, folder: Path, state: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> None:
        """Hugging Face format, and the adapter beside it in peft's. `state`: full weights, named as by `weights()`;
        `adapter`: as by `adapter_weights()`."""
        kept = {name: tensor for name, tensor in state.items() if not name.startswith(VALUE_HEAD_PREFIX)}
        config, self.hf.config = self.hf.config, self.saved_config
        try:
            self.hf.save_pretrained(folder, state_dict=kept)
        finally:
            self.hf.config = config
        if self.adapter:
            self.adapter.save(folder / ADAPTER_FOLDER, adapter)


def _leave_out_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """What a checkpoint holds beside an adapter: frozen weights, under all their names, are in the model's folder."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


class Policy(Scorer):
    """Log-probs and entropies of a causal language model; `vocab_logprobs` are those of every token, (N, V)."""

    provides = ("logprobs", "entropies", "vocab_logprobs")
    task = "CAUSAL_LM"

    def __init__(self, hf: PreTrainedModel, settings: EngineSettings, saved_config: Any) -> None:
        super().__init__(hf, settings, saved_config)
        head = hf.get_output_embeddings()
        if head is None or not hasattr(head, "weight"):
            raise HybridFlowError(f"{type(hf).__name__} has no linear output head to compute log-probs from")
        bias, chunk_tokens = getattr(head, "bias", None), settings.logprob_chunk_tokens
        self.head = TokenHead(head.weight, bias, chunk_tokens, settings.float32_head)

    def forward(
        self, tokens_BT: Tensor, index_N: Tensor, outputs: Sequence[str], temperature: float
    ) -> dict[str, Tensor]:
        hidden_ND = self.hidden_at(tokens_BT, index_N - 1)
        targets_N = tokens_BT.flatten().index_select(0, index_N)
        read = self.head(hidden_ND, targets_N, temperature, "entropies" in outputs, "vocab_logprobs" in outputs)
        found = {name: value for name, value in zip(self.provides, read, strict=True) if value is not None}
        return {name: found[name] for name in outputs}

    def trailing(self, output: str) -> tuple[int, ...]:
        return (self.vocab_size,) if output == "vocab_logprobs" else ()


class ValueHead(nn.Linear):
    """Linear in float32 at least, also where an engine has cast its weight to bfloat16 (with a float32 master)."""

    def forward(self, hidden_ND: Tensor) -> Tensor:
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        return nn.functional.linear(hidden_ND.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class Critic(Scorer):
    """V of the state before each token: a float32 linear head on the backbone's hidden states. It starts at 0."""

    provides = ("values",)

    def __init__(self, hf: PreTrainedModel, settings: EngineSettings, saved_config: Any) -> None:
        super().__init__(hf, settings, saved_config)
        dtype = torch.float64 if settings.dtype == "float64" else torch.float32
        self.value_head = ValueHead(hf.config.get_text_config().hidden_size, 1, dtype=dtype)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(
        self, tokens_BT: Tensor, index_N: Tensor, outputs: Sequence[str], temperature: float
    ) -> dict[str, Tensor]:
        hidden_ND = self.hidden_at(tokens_BT, index_N - 1)
        return {"values": self.value_head(hidden_ND)[:, 0]}

    def named_tensors(self) -> dict[str, Tensor]:
        head = self.value_head.state_dict(keep_vars=True)
        return {**super().named_tensors(), **{VALUE_HEAD_PREFIX + name: tensor for name, tensor in head.items()}}

    def export(self, folder: Path, state: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> None:
        super().export(folder, state, adapter)
        names = [name for name in state if name.startswith(VALUE_HEAD_PREFIX)]
        for place in (folder, folder / ADAPTER_FOLDER) if self.adapter else (folder,):
            save_file({name: state[name].contiguous() for name in names}, place / VALUE_HEAD_FILE)

    def load_value_head(self, folder: Path) -> None:
        """The head that an export put there; a folder without one changes nothing."""
        if (folder / VALUE_HEAD_FILE).is_file():
            head = load_file(folder / VALUE_HEAD_FILE)
            self.value_head.load_state_dict({name.removeprefix(VALUE_HEAD_PREFIX): head[name] for name in head})


class RewardModel(Critic):
    """Score of the text that ends with each token (Bradley-Terry reads the last one's, process rewards the steps')."""

    provides = ("scores",)

    def forward(
        self, tokens_BT: Tensor, index_N: Tensor, outputs: Sequence[str], temperature: float
    ) -> dict[str, Tensor]:
        return {"scores": self.value_head(self.hidden_at(tokens_BT, index_N))[:, 0]}


def load_scorer(folder: Path, settings: EngineSettings, kind: ModelKind) -> Scorer:
    """A policy, critic or reward model from a causal language model's folder, or one of the latter two from a folder
    that such a one exported; with an adapter where the settings have one.

    Raises HybridFlowError naming the model when its logits are not head(hidden), or when right padding changes them.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model folder {folder}: no config.json; give a Hugging Face model folder")
    saved_config = AutoConfig.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder, **_without_dropout(folder))
    auto = AutoModelForCausalLM if kind == "causal_lm" else AutoModel
    hf = auto.from_pretrained(folder, config=config, dtype=_DTYPES[settings.dtype], attn_implementation="sdpa")
    scorer = {"causal_lm": Policy, "critic": Critic, "reward_model": RewardModel}[kind](hf, settings, saved_config)
    if isinstance(scorer, Policy):
        check_head(scorer)
    check_padding(scorer)
    if settings.lora is not None:
        scorer.add_adapter(settings.lora, folder)
    if isinstance(scorer, Critic):
        scorer.load_value_head(folder)
        if settings.lora is not None and settings.lora.init_from is not None:
            scorer.load_value_head(Path(settings.lora.init_from))
    return scorer


def _without_dropout(folder: Path) -> dict[str, float]:
    """Zero for every numeric setting whose name speaks of dropout or of router noise: some layers read these directly
    while in training mode, which activation checkpointing needs."""
    fields = json.loads((folder / "config.json").read_text())
    pattern = re.compile(r"drop|jitter_noise")
    return {name: 0.0 for name, value in fields.items() if pattern.search(name) and isinstance(value, float)}


@contextmanager
def _amplified(backbone: nn.Module, factor: float) -> Iterator[None]:
    """Multiply the hidden states that leave the backbone, so that a soft cap on the logits shows even when the weights
    are small."""

    def scale(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * factor
        return output

    handle = backbone.register_forward_hook(scale)
    try:
        yield
    finally:
        handle.remove()


def _probe_tokens(scorer: Scorer) -> Tensor:
    device = next(scorer.parameters()).device
    return (torch.arange(12, device=device) * 7 % scorer.hf.config.get_text_config().vocab_size).view(2, 6)


@torch.no_grad()
def check_head(policy: Policy) -> None:
    """Refuse a model whose own logits are not `hidden @ head.T + bias` (soft caps, logit scales, extra projections)."""
    tokens_BT = _probe_tokens(policy)
    with _amplified(policy.backbone, 100.0):
        hidden_BTD = policy.backbone(input_ids=tokens_BT, use_cache=False).last_hidden_state
        expected = policy.hf(input_ids=tokens_BT, use_cache=False).logits.double()
    found = nn.functional.linear(hidden_BTD, policy.head.weight, policy.head.bias).double()
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not error <= _tolerance(policy):
        raise HybridFlowError(
            f"{type(policy.hf).__name__}: its logits differ from head(hidden) by {error:.1e} of the largest, so "
            "log-probs computed in chunks would be wrong. It caps or scales logits (final_logit_softcapping, "
            "logit_scale and the like); train a model without, or switch that off in its config.json"
        )


@torch.no_grad()
def check_padding(scorer: Scorer) -> None:
    """Refuse a model in which a token sees what is to its right (then right padding would leak into outputs)."""
    tokens_BT = _probe_tokens(scorer)
    alone = scorer.backbone(input_ids=tokens_BT[:, :4], use_cache=False).last_hidden_state.double()
    padded = scorer.backbone(input_ids=tokens_BT, use_cache=False).last_hidden_state[:, :4].double()
    error = float((alone - padded).abs().max() / alone.abs().max().clamp_min(1e-30))
    if not error <= _tolerance(scorer):
        raise HybridFlowError(
            f"{type(scorer.hf).__name__}: outputs change by {error:.1e} of the largest when tokens are added to the "
            "right; only causal models with outputs that repeat can be trained. Found a bidirectional or random model"
        )


def _tolerance(scorer: Scorer) -> float:
    return 2e-2 if next(scorer.hf.parameters()).dtype == torch.bfloat16 else 1e-4
