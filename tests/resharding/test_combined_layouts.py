from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from random_layouts import Side, sides

from hybridflow.errors import WeightSyncError
from hybridflow.resharding.layout import Layout, Parameter, Pieces, combined, renumbered
from hybridflow.resharding.shards import Spec, build_layout, grid


def only(layout: Layout, rank: int) -> Layout:
    """What this rank alone would describe."""
    mine = [i for i, storage in enumerate(layout.storages) if storage.rank == rank]
    rows = np.nonzero(layout.pieces.rank == rank)[0]
    columns = {name: getattr(layout.pieces, name)[rows] for name in Pieces.__annotations__}
    columns["storage"] = np.searchsorted(mine, columns["storage"])
    return Layout(layout.parameters, tuple(layout.storages[i] for i in mine), Pieces(**columns), (rank,))


def same(one: Layout, other: Layout) -> bool:
    return (one.parameters, one.storages, one.ranks) == (other.parameters, other.storages, other.ranks) and all(
        np.array_equal(getattr(one.pieces, name), getattr(other.pieces, name)) for name in Pieces.__annotations__
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(side=sides())
def test_what_each_rank_describes_makes_the_layout_of_all(side: Side):
    alone = [only(side.layout, rank) for rank in side.layout.ranks]
    assert same(combined(alone), side.layout)
    shift = 5
    moved = [renumbered(renumbered(layout, -rank), rank + shift) for rank, layout in enumerate(alone)]
    assert same(combined(moved), renumbered(side.layout, shift))


def test_ranks_described_twice_and_other_parameters_are_refused():
    one = build_layout([Spec(Parameter("w", (4, 4))), Spec(Parameter("b", (4,)))], grid())
    with pytest.raises(WeightSyncError, match=r"ranks \[0\] are described twice"):
        combined([one, one])
    for parameters, found in (((one.parameters[0],), "2 and 1 of them"), (one.parameters[::-1], "first: w")):
        with pytest.raises(WeightSyncError, match=rf"\(0,\) and \(1,\) list different parameters.*{found}"):
            combined([one, renumbered(replace(one, parameters=parameters), 1)])
    with pytest.raises(WeightSyncError, match="nothing to combine"):
        combined([])
