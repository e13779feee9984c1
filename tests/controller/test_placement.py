"""What fits where."""

import pytest

from hybridflow.controller.failures import exit_signal, last_lines
from hybridflow.controller.lanes import InlineLane
from hybridflow.controller.placement import Pool, check_supply, order_by_node
from hybridflow.errors import ConfigError


def test_bundles_are_not_cut_over_nodes():
    nodes = {"a": {"CPU": 3.0}, "b": {"CPU": 3.0}}
    check_supply("p", 2, {"CPU": 2.0}, nodes)
    with pytest.raises(ConfigError) as caught:
        check_supply("p", 3, {"CPU": 2.0}, nodes)
    text = str(caught.value)
    assert "demand: 3 bundles of 2 CPU" in text and "node a: free 3 CPU; holds 1 bundles" in text
    assert "supply: 2 bundles" in text


def test_neighbouring_ranks_share_a_node():
    assert order_by_node(["b", "a", "b", "a"]) == [1, 3, 0, 2]


def test_a_rank_that_starts_processes_takes_neighbouring_bundles():
    pool = Pool("p", 4, 1.0, 0.0, 1, InlineLane(), order=[1, 3, 0, 2], nodes=["b", "a", "b", "a"])
    assert [pool.bundles_of(rank, 2) for rank in range(2)] == [[1, 3], [0, 2]]
    assert [pool.bundles_of(rank, 1) for rank in range(4)] == [[1], [3], [0], [2]]
    with pytest.raises(ConfigError, match=r"rollout: 3 ranks .* 4 bundles; one rank of this group takes 2 bundles"):
        pool.admit("rollout", 3, 2)
    pool.admit("rollout", 2, 2)
    apart = Pool("p", 4, 1.0, 0.0, 1, InlineLane(), order=[0, 1, 2, 3], nodes=["a", "b", "b", "b"])
    with pytest.raises(ConfigError, match=r"rank 0 takes 2 bundles of one node, .* are on a and b; make .* of 2"):
        apart.admit("rollout", 2, 2)
    assert apart.groups == []


def test_a_rank_takes_its_share_of_a_bundle():
    pool = Pool("p", 1, 1.0, 1.0, 3, InlineLane())
    assert pool.rank_resources == {"num_cpus": 0.3333, "num_gpus": 0.3333}


@pytest.mark.parametrize(
    ("detail", "lines", "kills", "expected"),
    [
        ("SYSTEM_ERROR", ["Fatal Python error: Segmentation fault"], 0, "SIGSEGV"),
        ("SYSTEM_ERROR", ["fine"], 1, "out of memory"),
        ("SYSTEM_ERROR", ["fine"], 0, "SIGKILL or os._exit"),
        ("exit type: INTENDED_USER_EXIT", [], 0, "INTENDED_USER_EXIT"),
    ],
)
def test_exit_signal(detail, lines, kills, expected):
    assert expected in exit_signal(detail, lines, kills)


def test_last_lines(tmp_path):
    log = tmp_path / "rank.log"
    log.write_text("\n".join(map(str, range(100))))
    assert last_lines(log, 2) == ["98", "99"]
    assert "does not exist" in last_lines(tmp_path / "none")[0]
