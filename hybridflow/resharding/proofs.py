"""The three proofs of a weight transfer (design rule 6), as pure functions.

1. Every parameter is named and every element was written: the plan fills every storage of every engine, and each of its
moves arrived. 2. The checksum of each slice as received equals that of the slice as sent. 3. The engine's log-probs of
fixed probe tokens equal the trainer's. A policy version rises only when all of them hold for every engine.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hybridflow.errors import WeightSyncError
from hybridflow.resharding.incoming import Checksums
from hybridflow.resharding.plan import Move, Plan

MAX_NAMED = 5


@dataclass(frozen=True)
class Receipt:
    """What an engine proves after a transfer. checksums: of every move of its tensor ranks as received, by row
    of the plan; a row that is missing was not written. probe_logprobs: of `probe[1:]` given prefixes."""

    checksums: Checksums
    probe_logprobs: list[float]

    @property
    def num_bytes(self) -> int:
        """Bytes that arrived, as the engine counted them."""
        return sum(checksum.num_bytes for checksum in self.checksums.values())


@dataclass(frozen=True)
class Difference:
    """What an engine's tensor rank holds otherwise than published. low, high: the smallest box of the parameter (three
    axes) around it; largest: absolute difference."""

    parameter: str
    rank: int
    low: tuple[int, int, int]
    high: tuple[int, int, int]
    largest: float

    def __str__(self) -> str:
        return (
            f"{self.parameter}, tensor rank {self.rank}, {list(self.low)} to {list(self.high)}: off by up to "
            f"{self.largest:g}"
        )


@dataclass(frozen=True)
class ReadBack:
    """How the weights that an engine computes with compare with the trainer's. unread: parameters that it keeps in a
    form which cannot be read (experts packed for a CPU's kernels)."""

    differences: tuple[Difference, ...]
    unread: tuple[str, ...] = ()


def refuse_differences(found: Sequence[ReadBack]) -> None:
    """Raise WeightSyncError naming parameter, rank and slice where one of the engines holds something else."""
    for engine, of_engine in enumerate(found):
        if of_engine.differences:
            raise WeightSyncError(
                f"weight sync, rollout rank {engine}: read back, {len(of_engine.differences)} slices are not the "
                f"trainer's: {_some(map(str, of_engine.differences))}. The policy version does not rise. The transfer "
                "itself was proven, so the engine changes weights as it loads them"
            )


def verify(
    plan: Plan, sent: Checksums, sent_logprobs: Sequence[float], receipts: Sequence[Receipt], tolerance: float
) -> None:
    """Raise WeightSyncError unless the engines' receipts prove that they hold what the plan sends them.

    sent: of every row of the plan, by the ranks that sent it. receipts: one an engine, in rank order; each has an equal
    part of the plan's destination ranks. tolerance: largest allowed absolute difference of a probe log-prob.
    """
    verify_written(plan, sent, receipts)
    verify_probes(sent_logprobs, receipts, tolerance)


def verify_written(plan: Plan, sent: Checksums, receipts: Sequence[Receipt]) -> None:
    """The first two proofs of `verify`."""
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


def verify_probes(sent_logprobs: Sequence[float], receipts: Sequence[Receipt], tolerance: float) -> None:
    """The third proof of `verify`."""
    for engine, receipt in enumerate(receipts):
        _verify_probe(receipt.probe_logprobs, sent_logprobs, tolerance, f"weight sync, rollout rank {engine}")


def _slice_of(move: Move) -> str:
    return f"{move.parameter} {list(move.low)} to {list(move.high)} of source rank {move.source.rank}"


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
