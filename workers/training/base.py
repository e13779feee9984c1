"""What every training engine does. One rank holds one engine; ranks of a group call it together (SPMD)."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from hybridflow.batch import Batch, Ragged
from hybridflow.loss import Loss, Output
from hybridflow.metrics import Metrics
from hybridflow.resharding.layout import Layout
from hybridflow.roles import MemoryPart


class TrainEngine(Protocol):
    """A model under training (or frozen: a reference) on this rank."""

    def forward(self, batch: Batch, outputs: Sequence[Output], temperature: float) -> dict[str, Ragged]:
        """Needs `tokens`. Per-token columns, float32, as long as `tokens`: log-prob, entropy at t of `tokens[t]` given
        its prefix (0 at t = 0); values: V of the state *before* token t is emitted (the head at t - 1; 0 at t = 0);
        scores: a reward model's score of the text up to and with token t. No gradient, dropout off, full logits never
        kept for more than a chunk."""
        ...

    def reference_forward(self, batch: Batch, outputs: Sequence[Output], temperature: float) -> dict[str, Ragged]:
        """`forward` of the policy before training, which an engine that trains an adapter (`lora`) still holds: the
        model with the adapter off, or as it began from `lora.init_from`. HybridFlowError elsewhere."""
        ...

    def trailing(self, output: Output) -> tuple[int, ...]:
        """The shape of an output at one token: () for a number, (V,) for `vocab_logprobs`."""
        ...

    def train(self, parts: Sequence[tuple[Batch, Loss]]) -> Metrics:
        """One optimizer step on the sum over parts, rows and trainable tokens of `loss_weight * loss`. A batch needs
        `tokens`, `response_mask`, `loss_weight` (global weights: ranks and micro-batches only sum) and what the loss
        declares. Rows are cut into micro-batches of at most `tokens_per_micro_batch` padded tokens; ranks pad with
        zero-weight micro-batches to equal counts. Raises NonFiniteError, on every rank and before stepping, when the
        loss or the gradient norm is not finite. Metrics: `loss`, `grad_norm`, `lr` and the loss's own."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]:
        """The full weights on every rank under their Hugging Face names, `lm_head.weight` included even when tied; an
        adapter is merged into them."""
        ...

    def layout(self) -> Layout:
        """Which slice of which parameter this rank holds: `ranks` is this rank alone, shapes are of the whole model,
        names those of `state_dict`, `lm_head.weight` included even when tied; an adapter's A and B are parameters of
        their own, and the weights beside them plain. The same before and after training."""
        ...

    def fixed(self) -> frozenset[str]:
        """The layout's parameters that training never changes."""
        ...

    def storages(self) -> Mapping[str, Tensor]:
        """The layout's tensors by storage name, flat, contiguous and live: the optimizer writes them in place, so what
        is put into shared memory once (`untyped_storage().share_memory_()`) goes on being trained there. After
        `offload` of the weights and `onload` the memory is other memory."""
        ...

    def offload(self, parts: Collection[MemoryPart]) -> None:
        """Give this memory of the rank's device back until `onload`: from a GPU to the host's memory, from the host's
        memory to a file. Gradients go nowhere: after a step nothing reads them. Work that needs what is away raises
        HybridFlowError: `forward` needs the weights, `train`, `save` and `load` need all. Training goes on bit by bit
        as if nothing had been away."""
        ...

    def onload(self) -> None:
        """Take back what is away, if anything."""
        ...

    def save(self, folder: Path) -> None:
        """Weights that train, optimizer, scheduler and RNG of all ranks into `folder` (exists; shared by the ranks)."""
        ...

    def load(self, folder: Path) -> None: ...

    def export(self, folder: Path) -> None:
        """Hugging Face format, written by rank 0; the tokenizer is copied beside it by the caller. An adapter is merged
        into the weights, and by itself in `adapter/`, in peft's format."""
        ...
