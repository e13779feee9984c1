"""What a person chooses about rollout engines."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from hybridflow.settings import Settings
from workers.generation.base import Sampling

_SAID_ELSEWHERE = {
    "model": "model.path",
    "dtype": "rollout.dtype",
    "tensor_parallel_size": "rollout.tensor_parallel_size",
    "max_model_len": "rollout.max_model_len",
    "max_num_seqs": "rollout.max_num_seqs",
    "enforce_eager": "rollout.enforce_eager",
    "kv_cache_memory_bytes": "rollout.kv_cache_gib",
}
_FIXED = {
    "pipeline_parallel_size": "an engine's workers are tensor ranks alone",
    "data_parallel_size": "replicas are rollout ranks (placement.roles.rollout.ranks)",
    "enable_expert_parallel": "experts are cut as tensors",
    "worker_extension_cls": "weights arrive through it",
    "enable_lora": "an adapter is served where the actor trains one",
    "max_lora_rank": "it follows from the actor's adapter",
    "max_loras": "it follows from the actor's adapter",
    "lora_dtype": "an adapter has the dtype in which it is proven",
    "fully_sharded_loras": "adapters are cut as their layers are",
    "enable_sleep_mode": "schedule.sleep says when engines sleep",
    "logprobs_mode": "log-probs must be those of the distribution sampled from",
}

VLLM_ONLY = ("tensor_parallel_size", "kv_cache_gib", "enforce_eager", "bind_cores", "threads", "vllm")


class RolloutSettings(Settings):
    """One engine a rollout rank.

    engine: `vllm` or `hf` (Hugging Face generate; needs neither vLLM nor processes of its own).
    max_model_len: longest prompt plus response, in tokens; none: the model's own limit.
    max_num_seqs: sequences that decode together.
    kv_cache_gib: size of one engine's key-value cache (vllm).
    enforce_eager: run the model without compiling it first (vllm).
    bind_cores: on a CPU, give each replica cores of its own (vllm).
    threads: CPU threads of each tensor-parallel worker (vllm).
    float32_head: below float32, multiply by the language-model head in float32; set engine.float32_head too.
    sampling, validation: how training and validation responses are drawn.
    vllm: further engine arguments of vLLM, passed as they are, but for those that other settings decide.
    """

    engine: Literal["vllm", "hf"] = "vllm"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    tensor_parallel_size: int = Field(default=1, ge=1)
    max_model_len: int | None = Field(default=None, ge=2)
    max_num_seqs: int = Field(default=128, ge=1)
    kv_cache_gib: float = Field(default=1.0, gt=0)
    enforce_eager: bool = True
    bind_cores: bool = True
    threads: int = Field(default=1, ge=1)
    float32_head: bool = False
    sampling: Sampling = Sampling()
    validation: Sampling = Sampling(temperature=0.0)
    vllm: dict[str, Any] = Field(default_factory=dict)

    @field_validator("vllm")
    @classmethod
    def _theirs_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if key in _SAID_ELSEWHERE:
                raise ValueError(f"{key}: {_SAID_ELSEWHERE[key]} says it, for all that must agree with it; set that")
            if key in _FIXED:
                raise ValueError(f"{key}: cannot be chosen, since {_FIXED[key]}; remove it")
        return value

    def unread(self) -> Mapping[str, str]:
        return dict.fromkeys(self.changed(*VLLM_ONLY), "engine=vllm") if self.engine == "hf" else {}
