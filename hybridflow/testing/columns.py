"""Made-up columns and rows for losses: what a column holds follows from the registry and its name."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridflow import columns as registry
from hybridflow.loss import Loss
from hybridflow.testing.violation import ContractViolation

JUNK = {"NaN": math.nan, "inf": math.inf, "random": None}
"""What may stand at masked slots, by name; None is another number in each."""

Maker = Callable[[Tensor, torch.Generator], Tensor]
"""(mask (B, T), generator) -> a column: (B, T), (B, T, K) or (B,)."""


@dataclass(frozen=True)
class MadeUp:
    """Right-padded rows. `lengths_B`: slots of each row, of which the first is never trainable."""

    mask_BT: Tensor
    lengths_B: Tensor
    atom_B: Tensor
    columns: dict[str, Tensor]


def made_up(loss: Loss, rows: int, width: int, vocabulary: int, own: Mapping[str, Maker] | None, seed: int) -> MadeUp:
    """Ragged rows with several spans of trainable tokens, and all columns that the loss declares. Rows of a pair, or of
    a group, are adjacent twos."""
    generator = torch.Generator().manual_seed(seed)
    lengths_B = torch.randint(3, width + 1, (rows,), generator=generator)
    slots_T = torch.arange(width)
    inside_BT = (slots_T > 0) & (slots_T < lengths_B[:, None])
    mask_BT = inside_BT & (torch.rand(rows, width, generator=generator) < 0.7)
    mask_BT[torch.arange(rows), lengths_B - 1] = True
    atom_B = torch.arange(rows) if loss.atom == "row" else torch.arange(rows) // 2
    columns = {}
    for name in loss.columns:
        maker = (own or {}).get(name) or _maker(name, atom_B, vocabulary)
        columns[name] = maker(mask_BT, generator)
        if columns[name].shape[:1] != (rows,) or (columns[name].ndim > 1 and columns[name].shape[1] != width):
            raise ContractViolation(
                f"column {name!r}: made as {tuple(columns[name].shape)}; {rows} rows of {width} slots"
            )
    return MadeUp(mask_BT, lengths_B, atom_B, columns)


def output(name: str, mask_BT: Tensor, vocabulary: int, generator: torch.Generator) -> Tensor:
    """What a model could have computed."""
    if name == "vocab_logprobs":
        return torch.randn(*mask_BT.shape, vocabulary, generator=generator, dtype=torch.float64).log_softmax(-1)
    numbers_BT = torch.randn(mask_BT.shape, generator=generator, dtype=torch.float64)
    if name == "logprobs":
        return -numbers_BT.abs() - 0.1
    return numbers_BT.abs() if name == "entropies" else numbers_BT


def _maker(name: str, atom_B: Tensor, vocabulary: int) -> Maker:
    if name in ("atom", "group"):
        return lambda mask_BT, generator: atom_B
    if name in ("chosen", "mismatched"):  # of two rows, the first is the chosen one, the second the mismatched one
        return lambda mask_BT, generator: torch.arange(len(atom_B)) % 2 == (name == "mismatched")
    if name == "desirable":
        return lambda mask_BT, generator: atom_B % 2 == 0
    if name.endswith("vocab_logprobs"):
        return lambda mask_BT, generator: output("vocab_logprobs", mask_BT, vocabulary, generator)
    spec = registry.spec(name)
    if spec is None or spec.shape == "object":
        raise ContractViolation(
            f"column {name!r}: no such column of numbers is registered; register it (hybridflow.columns.register), or "
            f"say how it is made: columns={{{name!r}: lambda mask_BT, generator: ...}}"
        )
    return lambda mask_BT, generator: _numbers(spec, mask_BT, generator)


def _numbers(spec: registry.ColumnSpec, mask_BT: Tensor, generator: torch.Generator) -> Tensor:
    shape = mask_BT.shape if spec.shape == "token" else mask_BT.shape[:1]
    if spec.dtype == "bool":
        return torch.rand(shape, generator=generator) < 0.5
    if spec.dtype.startswith("int"):
        return torch.randint(0, 5, shape, generator=generator)
    kind = "logprobs" if spec.name.endswith("logprobs") else "values"
    numbers = output(kind, torch.zeros(shape), 0, generator)
    return numbers.to(getattr(torch, spec.dtype))
