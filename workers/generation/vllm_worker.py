"""What runs inside vLLM's worker processes: taking weights in, and reading back what is held.

vLLM mixes this class into its own worker (`worker_extension_cls`), so `self.model_runner` is vLLM's. Linear weights are
repacked at load on a CPU: `reload_weights` is the only way in, and the live kernel the only way to read them back.
"""

import logging
import pickle
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from hybridflow.errors import WeightSyncError
from hybridflow.resharding.proofs import checksum
from hybridflow.resharding.weights import Entry, unpack
from workers.generation.vllm_loaders import Load, boxes_of, record_loads, unloaded
from workers.generation.vllm_read_back import held_parameters, read_back
from workers.generation.vllm_stream import receive_stream, reload

T = TypeVar("T")
Arguments = ParamSpec("Arguments")


def _answering(method: Callable[Arguments, dict[str, T]]) -> Callable[Arguments, dict[str, T] | dict[str, str]]:
    """Answer `error` instead of raising: vLLM reads ranks' answers in order and stops at the first exception, so those
    of later ranks would be taken for answers to the next call."""

    @wraps(method)
    def answer(*args: Arguments.args, **kwargs: Arguments.kwargs) -> dict[str, T] | dict[str, str]:
        try:
            return method(*args, **kwargs)
        except WeightSyncError as error:
            return {"error": str(error)}
        except Exception as error:
            logging.getLogger(__name__).exception("rollout: a call of a vLLM worker failed")
            return {"error": f"{type(error).__name__}: {error}"}

    return answer


class WeightReceiver:
    """Worker extension of one tensor-parallel rank. A method that fails answers `error`."""

    model_runner: Any
    _loads: list[Load]

    @_answering
    def slices(self, shapes: dict[str, list[int]]) -> dict[str, Any]:
        """`boxes`: what this rank loads of each Hugging Face parameter of these shapes."""
        model, config = self.model_runner.get_model(), self.model_runner.model_config
        self._loads = record_loads(model, config, shapes, config.dtype)
        left = sorted(unloaded(model, self._loads))
        if left:
            raise WeightSyncError(f"rollout.layout: no Hugging Face parameter is loaded into {', '.join(left)}")
        return {"boxes": boxes_of(self._loads, shapes), "dtype": str(config.dtype).removeprefix("torch.")}

    @_answering
    def receive_planned(self, message: bytes) -> dict[str, Any]:
        """message: pickled (Incoming of every tensor rank, publications, shapes). Answers `checksums` by row of the
        plan, `unwritten` (the engine's own parameters that nothing reached)."""
        from vllm.distributed import get_tensor_model_parallel_rank

        incoming, publications, shapes = pickle.loads(message)
        part = incoming[get_tensor_model_parallel_rank()]
        return receive_stream(self.model_runner, self._loads, shapes, part, publications)

    @_answering
    def read_back(self, message: bytes) -> dict[str, Any]:
        """As `receive_planned`, but compares; answers `differences` and `unread`."""
        from vllm.distributed import get_tensor_model_parallel_rank

        incoming, publications, shapes = pickle.loads(message)
        part = incoming[get_tensor_model_parallel_rank()]
        return read_back(self.model_runner.get_model(), self._loads, shapes, part, publications)

    @_answering
    def receive_weights(self, path: str, num_bytes: int, manifest: list[list[Any]]) -> dict[str, Any]:
        """Load the full weights of the mapped file. Answers checksums and element counts of what came, by name, and
        `unwritten`: the engine's own parameters that no tensor reached."""
        weights = _mapped(path, num_bytes, manifest)
        checksums = {name: checksum(tensor) for name, tensor in weights.items()}
        return {
            "checksums": checksums,
            "num_elements": {name: tensor.numel() for name, tensor in weights.items()},
            "unwritten": reload(self.model_runner, weights.items()),
        }

    @_answering
    def held_differences(self, path: str, num_bytes: int, manifest: list[list[Any]]) -> dict[str, float]:
        """Largest absolute difference, by the engine's own parameter name, between what this rank holds and its slice
        of the full weights of the mapped file; parameters that agree exactly are left out."""
        weights = _mapped(path, num_bytes, manifest)
        model = self.model_runner.get_model()
        differences = {}
        for name, label, held in held_parameters(model):
            wanted = _slice_for(model, name, held, weights)
            difference = float((held.float() - wanted.to(held.dtype).to(held.device).float()).abs().max())
            if difference != 0.0:  # NaN is a difference
                differences[label] = difference
        return differences


def _mapped(path: str, num_bytes: int, manifest: list[list[Any]]) -> dict[str, Tensor]:
    """Views of the file's pages: private (a writing engine would not touch the sender's) and copied by no one."""
    flat = torch.from_file(path, shared=False, size=num_bytes, dtype=torch.uint8)
    return unpack(flat, [Entry(name, dtype, tuple(shape), offset) for name, dtype, shape, offset in manifest])


def _slice_for(model: nn.Module, name: str, held: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """This rank's part of the full weights for one engine parameter: fused parts stacked, then cut like `held`."""
    from vllm.distributed import get_tensor_model_parallel_rank

    owner, kind = name.rsplit(".", 1)
    leaf = owner.rsplit(".", 1)[-1]
    module: Any = model.get_submodule(owner)
    parts = getattr(model, "packed_modules_mapping", {}).get(leaf, [leaf])
    full = [weights[f"{owner[: len(owner) - len(leaf)]}{part}.{kind}"] for part in parts]
    rank = get_tensor_model_parallel_rank()
    indices = getattr(module, "shard_indices", None)
    if indices is not None:  # vocabulary, padded with rows that no token reaches: they are compared with themselves
        cut = full[0][indices.org_vocab_start_index : indices.org_vocab_end_index].to(held.dtype)
        return torch.cat([cut, held[len(cut) :]])
    sizes = getattr(module, "output_partition_sizes", None) or [held.shape[0]]
    if hasattr(module, "input_size_per_partition") and module.input_size_per_partition < module.input_size:
        width = module.input_size_per_partition
        return full[0][:, rank * width : (rank + 1) * width] if held.ndim == 2 else full[0]
    cuts = []
    for part, size in zip(full, sizes, strict=True):
        shard = rank * (len(part) // size) // _ranks() if len(part) > size else 0
        cuts.append(part[shard * size : (shard + 1) * size])
    return torch.cat(cuts)


def _ranks() -> int:
    from vllm.distributed import get_tensor_model_parallel_world_size

    return get_tensor_model_parallel_world_size()
