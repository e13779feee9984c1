"""What engines share in receiving weights by a plan: its check before anything is written."""

from collections.abc import Sequence

from hybridflow.errors import WeightSyncError
from hybridflow.resharding.incoming import Incoming
from hybridflow.resharding.layout import Layout

MAX_NAMED = 5

FAILED = "a weight transfer failed half-way; send the weights again before generating"
"""What an engine that was left so answers to `generate`."""

ASLEEP = "the engine is asleep; wake its weights and its cache before generating"
NEW_MEMORY = "the weights did not survive the engine's sleep; send them before generating"
"""Likewise of one that sleeps, and of one that woke and holds nothing yet."""


def refuse_other_storages(layout: Layout, incoming: Sequence[Incoming], has_all: bool = True) -> None:
    """Raise unless there is one Incoming a rank of this layout, and it fills exactly that rank's storages, in order,
    each completely (as far as counting can tell: a plan is proven by `plan.validate`). Where only some parameters are
    to be filled, the engine must hold the others: has_all."""
    only = incoming[0].only if incoming else None
    if only is not None:
        if not has_all:
            raise WeightSyncError(
                f"rollout.receive: only {len(only)} of {len(layout.parameters)} parameters come, and this engine does "
                "not hold the others: it is new, its last transfer failed, or it slept without them. Send all"
            )
        layout = layout.only(only)
    if len(incoming) != len(layout.ranks):
        raise WeightSyncError(
            f"rollout.receive: {len(incoming)} parts of a plan for an engine of {len(layout.ranks)} tensor ranks; "
            "plan with the layout that this engine answers"
        )
    for rank, part in enumerate(incoming):
        ours = [(storage.name, storage.num_elements, storage.dtype) for storage in layout.storages_of(rank)]
        theirs = [
            (filling.storage.name, sum(move.num_elements for move in filling.moves), filling.storage.dtype)
            for filling in part.fillings
        ]
        if ours != theirs:
            found = [f"{name}: needs {count} elements of {dtype}" for name, count, dtype in ours]
            given = [f"{name}: needs {count} elements of {dtype}" for name, count, dtype in theirs]
            missing = [line for line in found if line not in given]
            unknown = [line.replace("needs", "gets") for line in given if line not in found]
            odd = missing + unknown or ["the order is another"]
            more = f" and {len(odd) - MAX_NAMED} more" if len(odd) > MAX_NAMED else ""
            raise WeightSyncError(
                f"rollout.receive, tensor rank {rank}: the plan is not for this engine: {'; '.join(odd[:MAX_NAMED])}"
                f"{more}. Plan with the layout that this engine answers"
            )
