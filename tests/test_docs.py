"""Pages that list what the tree holds."""

import re
from pathlib import Path

from hybridflow.tracking.metrics_catalogue import describe

ROOT = Path(__file__).parent.parent


def test_every_algorithm_has_one_row_in_the_table() -> None:
    page = (ROOT / "docs/algorithms.md").read_text(encoding="utf-8")
    tables = page.split("## Where implementations differ")[0]
    rows = re.findall(r"^\| ([a-z_]+) \|", tables, flags=re.MULTILINE)
    rows = [row for row in rows if row != "name"]
    assert sorted(rows) == sorted(path.stem for path in (ROOT / "conf/algorithm").glob("*.yaml"))


def test_every_metric_that_the_table_names_is_described() -> None:
    page = (ROOT / "docs/algorithms.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+/[a-z0-9_*]+)`", page))
    assert len(named) > 20
    assert [name for name in sorted(named) if describe(name) is None] == []
