"""The one place where vLLM's engine depends on its device, and the arguments it is started with."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from hybridflow.errors import ConfigError
from workers.generation.adapter import ServedAdapter
from workers.generation.settings import RolloutSettings
from workers.generation.vllm_memory import AT_START

NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What model configs call it."""


LEAST_SHARE = 0.01
"""Of a GPU; what vLLM's 0.92 decides otherwise, the cache's size, is `kv_cache_gib`."""


def cores_of(replica: int, num_workers: int, threads: int, cores: list[int]) -> str:
    """vLLM's core list for one replica: workers are separated by `|`, a worker's cores by `,`. Replica r with t workers
    of n threads starts at core r * t * n, modulo the cores there are."""
    start = replica * num_workers * threads
    workers = [
        [cores[(start + worker * threads + thread) % len(cores)] for thread in range(threads)]
        for worker in range(num_workers)
    ]
    return "|".join(",".join(str(core) for core in dict.fromkeys(worker)) for worker in workers)


@contextmanager
def environment(settings: RolloutSettings, replica: int) -> Iterator[None]:
    """Variables that vLLM's processes inherit when they start; this process gets its own back afterwards."""
    from vllm.platforms import current_platform

    values = {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")}
    if current_platform.is_cpu():
        values |= {name: value for name, value in AT_START.items() if name not in os.environ}
        values["OMP_NUM_THREADS"] = str(settings.threads)  # two engines that spin against each other are 10 x slower
        if settings.bind_cores:
            available = sorted(os.sched_getaffinity(0))
            values["VLLM_CPU_OMP_THREADS_BIND"] = cores_of(
                replica, settings.tensor_parallel_size, settings.threads, available
            )
        if settings.enforce_eager:
            values["TORCH_COMPILE_DISABLE"] = "1"  # else the first sampled token waits 30 s for one compiled function
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def engine_arguments(
    folder: Path, settings: RolloutSettings, max_tokens: int, adapter: ServedAdapter | None = None
) -> dict[str, Any]:
    """Arguments of vLLM's AsyncEngineArgs; `settings.vllm` wins."""
    from vllm.platforms import current_platform

    arguments: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,  # ids in, ids out
        "dtype": settings.dtype,
        "seed": 0,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "max_model_len": max_tokens,
        "max_num_seqs": settings.max_num_seqs,
        "kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30),
        "enforce_eager": settings.enforce_eager,
        "logprobs_mode": "processed_logprobs",  # of the distribution sampled from
        "generation_config": "vllm",  # the request alone says how to sample
        "disable_log_stats": True,
        "worker_extension_cls": "workers.generation.vllm_worker.WeightReceiver",
    }
    if adapter is not None:
        arguments |= _adapter_arguments(folder, adapter)
    if settings.float32_head:
        arguments["hf_overrides"] = {"head_dtype": "float32"}  # which vLLM's LogitsProcessor reads
    if current_platform.is_cpu():
        _refuse_unsupported_heads(folder)
        # A seeded request whose prefill is cut in chunks kills the CPU engine.
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(max_tokens, 8192)
        if settings.enforce_eager:
            arguments["compilation_config"] = {"custom_ops": ["all"]}  # fused kernels; vLLM leaves them to a compiler
        if settings.tensor_parallel_size == 1:
            arguments["distributed_executor_backend"] = "workers.generation.vllm_executor.InCoreExecutor"
    else:
        arguments["enable_sleep_mode"] = True
        # Of a device that trainers share: vLLM starts only where this share is free. The cache's size is given above.
        arguments["gpu_memory_utilization"] = LEAST_SHARE
    if settings.tensor_parallel_size > 1:
        arguments["distributed_executor_backend"] = "mp"
    return {**arguments, **settings.vllm}


def _adapter_arguments(folder: Path, adapter: ServedAdapter) -> dict[str, Any]:
    """One adapter, in the layers that have it, in memory for the next rank that vLLM knows."""
    from transformers import AutoConfig
    from vllm.config.lora import MaxLoRARanks
    from vllm.model_executor.models import ModelRegistry, supports_lora
    from vllm.platforms import current_platform

    config = AutoConfig.from_pretrained(folder)
    if current_platform.is_cpu() and any(getattr(config.get_text_config(), name, None) for name in NUM_EXPERTS):
        raise ConfigError(
            f"actor.engine.lora: the model in {folder} is a mixture of experts, which vLLM on a CPU cannot run beside "
            "LoRA layers (it takes GPU kernels for the experts then). Set rollout=hf, or lora=null"
        )
    for architecture in config.architectures or ():
        known = ModelRegistry.models.get(architecture)
        if known is not None and not supports_lora(known.load_model_cls()):
            raise ConfigError(
                f"actor.engine.lora: vLLM has no LoRA layers for {architecture}, the model in {folder}. Set "
                "rollout=hf, or lora=null"
            )
    ranks = get_args(MaxLoRARanks)
    enough = [rank for rank in ranks if rank >= adapter.rank]
    if not enough:
        raise ConfigError(
            f"actor.engine.lora.rank: found {adapter.rank}; vLLM's LoRA layers have ranks up to {max(ranks)}. Choose a "
            "smaller one, or set rollout=hf"
        )
    modules = sorted({layer.rpartition(".")[2] for layer in adapter.layers})
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": min(enough), "lora_target_modules": modules}


def _refuse_unsupported_heads(folder: Path) -> None:
    """vLLM's CPU attention finds out only when it computes the first token, and then the engine dies."""
    from transformers import AutoConfig
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    config = AutoConfig.from_pretrained(folder).get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    supported = CPUAttentionBackend.get_supported_head_sizes()
    if size not in supported:
        raise ConfigError(
            f"rollout.engine=vllm on a CPU: the model in {folder} has attention heads of {size}; vLLM supports "
            f"{supported}. Choose another hidden_size / num_attention_heads, or set rollout.engine=hf"
        )
