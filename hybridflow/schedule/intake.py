"""From prompts to the rows that a step learns from: sample, score, and ask the algorithm which groups it takes.

A group that the algorithm wants replaced (`refill`) costs one more prompt. Each round draws exactly as many prompts as
are missing, in data order, so nothing is ever left over and what a step takes is a function of the data cursor alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hybridflow.algorithm import Algorithm
from hybridflow.batch_ref import BatchRef
from hybridflow.metrics import Metric, Metrics


@dataclass(frozen=True)
class Intake:
    """rows: of the accepted groups, in request order. scored: of every group that was sampled."""

    rows: BatchRef
    scored: BatchRef
    metrics: Metrics


def collect(
    algorithm: Algorithm,
    draw: Callable[[int], BatchRef],
    sample_and_score: Callable[[BatchRef], BatchRef],
    num_prompts: int,
) -> Intake:
    """`draw(n)` gives the next n prompts; `sample_and_score(requests)` one scored row a request."""
    kept: list[BatchRef] = []
    scored: list[BatchRef] = []
    counts = {"keep": 0, "drop": 0, "refill": 0, "skip": 0}
    missing, first_group = num_prompts, 0
    for _ in range(type(algorithm).max_draws(algorithm.config)):
        prompts = draw(missing)
        requests = algorithm.requests(prompts)
        groups = len(np.unique(requests.scalar("group")))
        counts["skip"] += prompts.num_rows - groups
        missing = prompts.num_rows - groups
        if groups:
            requests = requests.with_scalars(group=requests.scalar("group") + first_group)
            first_group += prompts.num_rows
            scored.append(sample_and_score(requests))
            verdicts = {int(g.scalar("group")[0]): algorithm.accept(g) for g in scored[-1].group_by("group")}
            for verdict in verdicts.values():
                counts[verdict] += 1
            kept.append(_of_groups(scored[-1], [group for group, verdict in verdicts.items() if verdict == "keep"]))
            missing += sum(verdict == "refill" for verdict in verdicts.values())
        if not missing:
            break
    return Intake(BatchRef.concat(kept), BatchRef.concat(scored), _metrics(counts))


def _of_groups(rows: BatchRef, groups: list[int]) -> BatchRef:
    inside = np.isin(rows.scalar("group"), groups)
    return rows if inside.all() else rows.take(np.flatnonzero(inside))


def _metrics(counts: dict[str, int]) -> Metrics:
    return {
        "group/accepted": Metric(counts["keep"], reduction="sum"),
        "group/rejected": Metric(counts["drop"] + counts["refill"], reduction="sum"),
        "group/skipped_prompts": Metric(counts["skip"], reduction="sum"),
    }


def diagnosis(taken: Intake) -> str:
    """Why a step may have nothing to learn from: of the rows that were taken, or from the scores of all samples."""
    scored = taken.scored
    if not scored.num_rows:
        return "took no group: no prompt was sampled, the algorithm skipped them all"
    if taken.rows.num_rows:
        empty = int((taken.rows.scalar("response_length") == 0).sum())
        return (
            f"took {taken.rows.num_rows} samples and left none of them to learn from: "
            f"{int(taken.rows.scalar('abstained').astype(bool).sum())} have no score, {empty} no response, the others "
            "no sample of their prompt beside them, or `rejection` found them too far from the policy"
        )
    groups = [group.scalar("rewards") for group in scored.group_by("group")]
    low, high = min(float(r.min()) for r in groups), max(float(r.max()) for r in groups)
    equal = [float(r[0]) for r in groups if float(r.min()) == float(r.max())]
    best = sum(value == high for value in equal) if high > low else 0
    limited = float(scored.scalar("truncated").mean())
    return (
        f"took no group: of {len(groups)} groups {len(equal)} had one score for all their samples, {best} of them the "
        f"best seen ({high:g}; the worst is {low:g}); {limited:.0%} of responses hit the length limit. All worst: the "
        "task is too hard or the reward never fires; all best: it is solved"
    )
