"""What one rank of a training engine holds, as a layout, and the live tensors that this layout speaks of.

Every parameter of the model, a buffer or a value head too, has one storage under its own name; an adapter's A and B are
parameters beside the weights, which stay as they are. Where it is sharded by
nothing the storage is the parameter itself, seen flat; under ZeRO 3 it is this rank's flat partition with its padding.
Tied parameters are two storages on the same memory: sources may be.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from hybridflow.controller.coordinates import Coordinates
from hybridflow.errors import WeightSyncError
from hybridflow.resharding.cuts import Cut, shard
from hybridflow.resharding.layout import Layout, LayoutBuilder, Parameter
from workers.training.modeling import Scorer


@dataclass(frozen=True)
class _Held:
    """One parameter on this rank. shape: of the rank's tensor before ZeRO, () for a number."""

    name: str
    live: Tensor
    shape: tuple[int, ...]
    cut: Cut | None

    @property
    def partition(self) -> Tensor | None:
        """ZeRO 3's flat part of it, padding included."""
        return getattr(self.live, "ds_tensor", None)


class LayoutReader:
    """Reads one rank's weights where they live. cuts: of the parameters that are divided over tensor ranks."""

    def __init__(self, scorer: Scorer, coordinates: Coordinates, cuts: Mapping[str, Cut] | None = None) -> None:
        self.scorer = scorer
        self.coordinates = coordinates
        self.cuts = cuts or {}

    def layout(self) -> Layout:
        """See `TrainEngine.layout`."""
        at, rank = self.coordinates, self.coordinates.rank
        held = self._held()
        builder = LayoutBuilder(Parameter(one.name, self._whole_shape(one), _dtype(one.live)) for one in held)
        for one in held:
            cuts = () if one.cut is None else (one.cut,)
            local = shard(one.name, self._whole_shape(one), cuts, {"tensor": (at.tensor, at.shape.tensor)})
            start, stop = self._part(one)
            builder.open(rank, one.name, _dtype(one.live))
            builder.append(one.name, local, start, stop)
            if one.partition is not None:
                builder.pad(one.partition.numel() - (stop - start))
            builder.close()
        return builder.build([rank])

    def storages(self) -> dict[str, Tensor]:
        """See `TrainEngine.storages`."""
        return {one.name: self._flat(one) for one in self._held()}

    def fixed(self) -> frozenset[str]:
        """See `TrainEngine.fixed`. A buffer may be changed by a forward pass."""
        live = self.scorer.live()
        return frozenset(
            n for n, tensor in live.items() if isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        )

    def _held(self) -> list[_Held]:
        found = []
        for name, live in self.scorer.live().items():
            shape = tuple(getattr(live, "ds_shape", live.shape))
            one = _Held(name, live, shape, self.cuts.get(name))
            self._refuse_odd(one)
            found.append(one)
        return found

    def _refuse_odd(self, one: _Held) -> None:
        """Partitions that DeepSpeed can be told to keep elsewhere, or in another form, are not the weights."""
        part = one.partition
        if part is None:
            return
        size = -(-prod(one.shape) // self.coordinates.shape.data)
        if part.dtype != one.live.dtype or part.numel() < size:
            raise WeightSyncError(
                f"layout: rank {self.coordinates.rank}, {one.name}: its ZeRO 3 partition has {part.numel()} elements "
                f"of {_dtype(part)}; at least {size} of {_dtype(one.live)} are needed. Leave zero_quantized_weights, "
                "zero_hpz_partition_size and offload_param to nvme out of engine.deepspeed"
            )

    def _whole_shape(self, one: _Held) -> tuple[int, ...]:
        if one.cut is None:
            return one.shape
        dim, tensor = one.cut.dim, self.coordinates.shape.tensor
        return (*one.shape[:dim], one.shape[dim] * tensor, *one.shape[dim + 1 :])

    def _part(self, one: _Held) -> tuple[int, int]:
        """The flat interval of the rank's tensor that this data rank holds."""
        total = prod(one.shape)
        if one.partition is None:
            return 0, total
        size, index = one.partition.numel(), self.coordinates.data
        return min(index * size, total), min((index + 1) * size, total)

    def _flat(self, one: _Held) -> Tensor:
        part = one.live if one.partition is None else one.partition
        assert part.is_contiguous(), one.name
        return part.detach().view(-1)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
