"""The three proofs of a weight transfer (design rule 6), as pure functions.

1. Every parameter is named and every element was written. 2. The checksum of each tensor as received equals that of the
tensor as sent. 3. The engine's log-probs of fixed probe tokens equal the trainer's. A policy version rises only when
all of them hold for every engine.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from hybridflow.errors import WeightSyncError
from hybridflow.resharding.incoming import Checksums
from hybridflow.resharding.plan import Move, Plan
from hybridflow.resharding.weights import as_bytes

MAX_NAMED = 5


@dataclass(frozen=True)
class Receipt:
    """What an engine proves after a transfer; the trainer's own, of what it sent, has the same form.

    names: parameters written. num_elements and checksums: per name. probe_logprobs: of `probe[1:]` given prefixes.
    """

    names: frozenset[str]
    num_elements: Mapping[str, int]
    checksums: Mapping[str, int]
    probe_logprobs: list[float]


@dataclass(frozen=True)
class PlannedReceipt:
    """What an engine proves after a planned transfer. checksums: of every move of its tensor ranks as received, by row
    of the plan; a row that is missing was not written. probe_logprobs: of `probe[1:]` given prefixes."""

    checksums: Checksums
    probe_logprobs: list[float]


def verify_planned(
    plan: Plan, sent: Checksums, sent_logprobs: Sequence[float], receipts: Sequence[PlannedReceipt], tolerance: float
) -> None:
    """Raise WeightSyncError unless the engines' receipts prove that they hold what the plan sends them.

    sent: of every row of the plan, by the ranks that sent it. receipts: one an engine, in rank order; each has an equal
    part of the plan's destination ranks. tolerance: largest allowed absolute difference of a probe log-prob.
    """
    if not receipts:
        raise WeightSyncError("weight sync: no engine answered; the policy version stays as it is")
    received = {row: value for receipt in receipts for row, value in receipt.checksums.items()}
    every = set(range(len(plan.moves)))
    if odd := (set(sent) | set(received)) - every:
        raise WeightSyncError(f"weight sync: rows {sorted(odd)[:MAX_NAMED]} are not of the plan's {len(every)} moves")
    per_engine = len(plan.destination.ranks) // len(receipts)
    for proof, wrong in (
        ("elements written", every - set(received)),
        ("checksums as received", {row for row in received if sent.get(row) != received[row]}),
    ):
        if wrong:
            moves = plan.as_moves(plan.moves.rows(np.array(sorted(wrong))))
            engine, tensor_rank = divmod(moves[0].destination.rank, per_engine)
            where = f"weight sync, rollout rank {engine}, tensor rank {tensor_rank}"
            found = "not written" if proof == "elements written" else "other than sent"
            raise _failed(where, proof, f"{len(moves)} slices {found}: {_some(_slice_of(move) for move in moves)}")
    for engine, receipt in enumerate(receipts):
        _verify_probe(receipt.probe_logprobs, sent_logprobs, tolerance, f"weight sync, rollout rank {engine}")


def _slice_of(move: Move) -> str:
    return f"{move.parameter} {list(move.low)} to {list(move.high)} of source rank {move.source.rank}"


def checksum(tensor: Tensor) -> int:
    """CRC-32 of dtype, shape and bytes in order: any changed bit, and any two swapped elements, change it."""
    header = zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    return zlib.crc32(as_bytes(tensor).numpy().data, header)


def receipt(weights: Mapping[str, Tensor], probe_logprobs: Sequence[float]) -> Receipt:
    """The receipt for these tensors as they are in this process."""
    return Receipt(
        names=frozenset(weights),
        num_elements={name: tensor.numel() for name, tensor in weights.items()},
        checksums={name: checksum(tensor) for name, tensor in weights.items()},
        probe_logprobs=list(probe_logprobs),
    )


def refuse_other_shapes(expected: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor], where: str) -> None:
    """Raise unless `weights` has exactly the expected names, each of the expected shape. Nothing is written yet."""
    missing = sorted(set(expected) - set(weights))
    extra = sorted(set(weights) - set(expected))
    odd = [
        f"{name} has shape {tuple(weights[name].shape)} (expected {tuple(expected[name])})"
        for name in sorted(set(expected) & set(weights))
        if tuple(weights[name].shape) != tuple(expected[name])
    ]
    found = []
    if missing:
        found.append(f"{len(missing)} missing: {_some(missing)}")
    if extra:
        found.append(f"{len(extra)} unknown: {_some(extra)}")
    if odd:
        found.append(f"{len(odd)} of another shape: {_some(odd)}")
    if found:
        raise WeightSyncError(
            f"{where}: the weights sent are not those of this model ({'; '.join(found)}). Nothing was written; the "
            f"engine keeps its weights. Send the model's {len(expected)} tensors under their Hugging Face names, "
            "lm_head.weight included even when it is tied"
        )


def verify(receipts: Sequence[Receipt], sent: Receipt, tolerance: float) -> None:
    """Raise WeightSyncError unless every engine's receipt proves that it holds what was sent.

    receipts: one an engine, in rank order. tolerance: largest allowed absolute difference of a probe log-prob.
    """
    if not receipts:
        raise WeightSyncError("weight sync: no engine answered; the policy version stays as it is")
    for rank, got in enumerate(receipts):
        where = f"weight sync, rollout rank {rank}"
        _verify_names(got, sent, where)
        wrong = sorted(name for name in sent.names if got.checksums.get(name) != sent.checksums[name])
        if wrong:
            raise _failed(
                where, "checksums as received", f"{len(wrong)} tensors differ from those sent: {_some(wrong)}"
            )
        _verify_probe(got.probe_logprobs, sent.probe_logprobs, tolerance, where)


def _verify_names(got: Receipt, sent: Receipt, where: str) -> None:
    odd = sorted(got.names ^ sent.names)
    if odd:
        raise _failed(where, "names", f"{len(odd)} parameters on one side only: {_some(odd)}")
    short = [
        f"{name} ({got.num_elements.get(name, 0)} of {sent.num_elements[name]} elements)"
        for name in sorted(sent.names)
        if got.num_elements.get(name, 0) != sent.num_elements[name]
    ]
    if short:
        raise _failed(where, "elements written", _some(short))


def _verify_probe(got: Sequence[float], sent: Sequence[float], tolerance: float, where: str) -> None:
    if len(got) != len(sent):
        raise _failed(where, "probe log-probs", f"{len(got)} values for {len(sent)} probe tokens")
    for position, (theirs, ours) in enumerate(zip(got, sent, strict=True), start=1):
        difference = abs(theirs - ours)
        if not difference <= tolerance:  # also true for NaN
            found = f"probe token {position}: {theirs:.6f} in the engine, {ours:.6f} in the trainer"
            raise _failed(where, "probe log-probs", f"{found}; allowed difference {tolerance:g}")


def _failed(where: str, proof: str, found: str) -> WeightSyncError:
    return WeightSyncError(
        f"{where}: proof of {proof} failed: {found}. The policy version does not rise. "
        "Send the weights again; if it fails again, the engine does not support this model's layout"
    )


def _some(words: Iterable[str]) -> str:
    listed = list(words)
    more = f" and {len(listed) - MAX_NAMED} more" if len(listed) > MAX_NAMED else ""
    return ", ".join(listed[:MAX_NAMED]) + more
