"""The share of a step that the main job spends in transition: from the last update to engines with proven weights.

    python benchmarks/transition_share.py runs/arithmetic-grpo [another run's folder ...]

Reads the run folder that `make train` leaves, its steady steps after the first five: the median of what the phase
change takes (`sync`, and where engines sleep or trainers offload, `sleep` and `onload`) over `timing_s/step`, and from
the timeline what the sync consists of. Ends with `ratio <the first run's share>`.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from hybridflow.tracking.timeline import read_rows

UNSTEADY = 5
PARTS = ("sleep", "onload", "sync")


def share_of(folder: Path) -> float:
    lines = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [metrics for metrics in lines if "timing_s/sync" in metrics][UNSTEADY:]
    names = [f"timing_s/{part}" for part in PARTS]
    share = statistics.median(sum(m.get(name, 0.0) for name in names) / m["timing_s/step"] for m in steps)
    seconds = statistics.median(metrics["timing_s/sync"] for metrics in steps)
    step = statistics.median(metrics["timing_s/step"] for metrics in steps)
    print(f"{folder}: {len(steps)} steps, median step {step:.3f} s, sync {seconds:.4f} s: {share:.2%} of a step")
    for name, parts in sorted(parts_of(folder).items()):
        print(f"  {name:<28}{statistics.median(parts):9.4f} s")
    return share


def parts_of(folder: Path) -> dict[str, list[float]]:
    """Seconds of the ranks' calls inside the driver's syncs, by role and call."""
    rows = read_rows(folder / "timeline.json")
    syncs = sorted((span.start_s, span.end_s) for span in rows["driver"] if span.name == "sync")[UNSTEADY:]
    found: dict[str, list[float]] = {}
    for row, spans in rows.items():
        for span in spans:
            inside = any(start <= span.start_s and span.end_s <= end for start, end in syncs)
            if inside and row != "driver":
                found.setdefault(f"{row} {span.name}", []).append(span.end_s - span.start_s)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folders", type=Path, nargs="+")
    shares = [share_of(folder) for folder in parser.parse_args().run_folders]
    print(f"ratio {shares[0]:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
