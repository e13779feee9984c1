"""The curves of benchmarks/learning.py as one picture: a panel an algorithm, mean reward against steps, a line a seed.

    pip install --no-deps --target .plot -r requirements/plot.txt
    PYTHONPATH=.plot python benchmarks/learning_plot.py runs/learning docs/learning.png

Rewards are those of the training samples, averaged over `WINDOW` steps. Grey is GRPO of the same seed, to compare with.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import numpy as np
from learning_cases import ONLINE
from learning_runs import metrics_lines
from matplotlib import pyplot

SEEDS, COLUMNS, WINDOW, LONGEST = (0, 1, 2), 6, 10, 200


def rewards(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(steps, mean rewards), each point the average of `WINDOW` steps and every fifth one kept."""
    name = "reward/mean"
    found = {line["step"]: line["metrics"][name] for line in metrics_lines(folder) if name in line["metrics"]}
    steps, values = np.array(sorted(found)), np.array([found[step] for step in sorted(found)])
    smooth = np.convolve(values, np.ones(WINDOW) / WINDOW, mode="valid")
    kept = slice(0, None, 5)
    return steps[WINDOW - 1 :][kept], smooth[kept]


def main(folder: Path, target: Path) -> None:
    rows = -(-len(ONLINE) // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(2.1 * COLUMNS, 1.7 * rows), sharex=True, sharey=True)
    for panel, case in zip(axes.flat, ONLINE, strict=False):
        for seed in SEEDS:
            panel.plot(*rewards(folder / f"grpo-{seed}"), color="0.8", linewidth=1)
        for seed in SEEDS:
            panel.plot(*rewards(folder / f"{case.name}-{seed}"), linewidth=1.2, label=f"seed {seed}")
        panel.set_title(case.name, fontsize=8)
        panel.set_xlim(0, LONGEST)
        panel.set_ylim(0, 1)
        panel.tick_params(labelsize=6)
    for panel in axes.flat[len(ONLINE) :]:
        panel.axis("off")
    axes.flat[0].legend(fontsize=5, frameon=False)
    figure.supxlabel("step (512 samples each)", fontsize=8)
    figure.supylabel("mean reward of training samples", fontsize=8)
    figure.tight_layout()
    figure.savefig(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
