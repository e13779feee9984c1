"""How a model is trained: the engine's part of the configuration."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from hybridflow.settings import Settings


class OptimizerSettings(Settings):
    """AdamW, or SGD without momentum. Weight decay is on every parameter: decoupled in AdamW, added to the gradient
    in SGD."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(default=1e-6, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)


class ScheduleSettings(Settings):
    """Learning rate per optimizer step (see `workers.training.optimizer`). `total_steps` counts the warm-up too."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    total_steps: int | None = Field(default=None, gt=0)
    min_ratio: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _decay_needs_a_horizon(self) -> "ScheduleSettings":
        if self.kind != "constant" and (self.total_steps is None or self.total_steps <= self.warmup_steps):
            raise ValueError(
                f"kind={self.kind} decays until total_steps, which must be above warmup_steps={self.warmup_steps}; "
                f"found total_steps={self.total_steps}. Set it, or use kind=constant"
            )
        return self


_VARIANTS = ("use_dora", "use_rslora", "use_qalora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern")
_PLAIN_LORA: dict[str, Any] = {"peft_type": "LORA", "bias": "none"} | dict.fromkeys(_VARIANTS, False)
"""Fields of an adapter_config.json whose other values change what an adapter computes."""


class LoraSettings(Settings):
    """A low-rank adapter (LoRA, 2106.09685) beside frozen weights: W x + (alpha / rank) B A x, of which A and B train.

    alpha: 32 keeps one learning rate good over ranks, where all linear layers have an adapter. dropout: of the
    adapter's input, while training and never while scoring; above 0 the gradient depends on how rows are split, and
    ratios before the first update are not 1. target_modules: `all-linear` (but not the output head), or names of linear
    modules, or their ends: `q_proj`, `layers.0.self_attn.q_proj`. init_from: folder of an adapter in peft's format, of
    the same rank, alpha and modules; null begins with B = 0, where the adapter changes nothing, and an A that is a
    function of `seed`. A frozen role has an adapter only with init_from.
    """

    rank: int = Field(gt=0)
    alpha: int = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    init_from: str | None = None
    seed: int = Field(default=0, ge=0)

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        listed = isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value)
        if value != "all-linear" and not listed:
            raise ValueError(f"found {value!r}; allowed: all-linear, or a list of names, such as [q_proj, v_proj]")
        return value

    def problems(self) -> list[str]:
        """What is wrong with the adapter in `init_from`, as lines of `field: text`."""
        if self.init_from is None:
            return []
        file = Path(self.init_from) / "adapter_config.json"
        if not file.is_file():
            return [f"init_from: found {self.init_from!r}; no adapter_config.json there: give a folder that peft wrote"]
        saved = json.loads(file.read_text())
        found = [
            f"{name}: found {ours}; the adapter in {self.init_from} has {saved.get(theirs)}: set that"
            for name, theirs, ours in (("rank", "r", self.rank), ("alpha", "lora_alpha", self.alpha))
            if saved.get(theirs) != ours
        ]
        odd = [f"{name}={saved[name]!r}" for name, plain in _PLAIN_LORA.items() if (saved.get(name) or plain) != plain]
        text = f"init_from: the adapter in {self.init_from} has {', '.join(odd)}; allowed: plain LoRA"
        return found + ([text] if odd else [])


_SAID_ELSEWHERE = {
    "gradient_clipping": "max_grad_norm",
    "tensor_parallel": "placement.roles.<role>.tensor",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "dtype",
    "fp16": "dtype",
    "train_batch_size": "tokens_per_micro_batch",
    "train_micro_batch_size_per_gpu": "tokens_per_micro_batch",
    "gradient_accumulation_steps": "tokens_per_micro_batch",
}
"""Keys of DeepSpeed's configuration that one of this project's settings decides."""


class EngineSettings(Settings):
    """One training engine.

    tokens_per_micro_batch: padded tokens (rows x longest) of one forward and backward; a longer row runs alone.
    max_grad_norm: global norm at which gradients are clipped; None never clips.
    logprob_chunk_tokens: positions whose logits exist at one time.
    float32_head: below float32, multiply by the language-model head in float32 (ScaleRL, 2510.13786), not only the
        softmax; set rollout.float32_head too, or the engines differ by more than without.
    deepspeed: merged over the DeepSpeed configuration that the engine writes, like `{"zero_optimization": {...}}`.
    threads: intra-op threads of a rank; None leaves the process's setting.
    compile: torch.compile of the layers (inductor, needs g++): some 15-25 % faster on a CPU after 20-60 s at the first
        step; pays on long runs.
    lora: train a low-rank adapter beside frozen weights (and a value head as ever); null trains all weights.
    """

    name: Literal["torch", "deepspeed"] = "deepspeed"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    tokens_per_micro_batch: int = Field(default=2048, gt=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    activation_checkpointing: bool = False
    zero_stage: Literal[0, 1, 2, 3] = 1
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    logprob_chunk_tokens: int = Field(default=4096, gt=0)
    float32_head: bool = False
    threads: int | None = Field(default=None, gt=0)
    compile: bool = False
    lora: LoraSettings | None = None

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "EngineSettings":
        if self.name == "deepspeed" and self.dtype == "float64":
            raise ValueError("dtype=float64 is for name=torch alone (checks of gradients); use float32 or bfloat16")
        if self.name == "deepspeed" and self.dtype == "bfloat16" and self.zero_stage == 0:
            raise ValueError(
                "zero_stage=0 with dtype=bfloat16 would sum gradients in bfloat16; use zero_stage=1, 2 or 3"
            )
        for key, ours in {**_SAID_ELSEWHERE, "zero_optimization.stage": "zero_stage"}.items():
            section, _, name = key.rpartition(".")
            if name in (self.deepspeed.get(section, {}) if section else self.deepspeed):
                raise ValueError(f"deepspeed.{key}: {ours} says it, for all that must agree with it; set that instead")
        if self.name == "deepspeed" and self.compile and self.zero_stage == 3:
            raise ValueError("compile=true does not work with zero_stage=3; use zero_stage=0, 1 or 2, or compile=false")
        return self

    def problems(self) -> list[str]:
        return [f"lora.{line}" for line in self.lora.problems()] if self.lora else []

    def unread(self) -> Mapping[str, str]:
        return dict.fromkeys(self.changed("zero_stage", "deepspeed"), "name=deepspeed") if self.name == "torch" else {}
