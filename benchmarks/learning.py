"""Does it learn? Every algorithm on two-digit addition, several seeds each, and rewards that must not teach it.

    python benchmarks/learning.py [--cases grpo ppo] [--seeds 0 1 2] [--runs 2] [--folder runs/learning]

Per seed a random model is warm-started by supervised training until it gets 35 % right (the step at which addition
sets in differs by hundreds between seeds); every algorithm trains from that same start. Online algorithms are judged by
held-out exact match; a control is GRPO with another reward, judged the same; offline policies by how many held-out
pairs they rank right, and reward models by their own held-out measure. Each run is a process with
`runtime=local engine=torch rollout=hf` and one thread. What an earlier call finished in --folder is not repeated.
Prints a table in Markdown; the last line is the smallest gain over its bar; exits 1 when a bar is missed: GRPO and PPO
gain 30 points and end at 70 % or more, the other online algorithms gain 10 points; chance never gains more than 3
points, and the inverted reward ends below its start. Plot: benchmarks/learning_plot.py.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from learning_cases import CONTROLS, OFFLINE, ONLINE, Case
from learning_runs import Points, control_curve, curve, preference_curve, warm_start, warmed

MIN_FINAL = 0.70
MOST_BY_CHANCE = 0.03


def missed(case: Case, points: Points) -> str | None:
    """What of its bar a run has missed."""
    before, after = points[0][1], points[-1][1]
    if case in OFFLINE:
        return None
    if case.name == "chance":
        highest = max(value for _, value in points)
        return f"gained {highest - before:.1%} by chance" if highest - before > MOST_BY_CHANCE else None
    if case.name == "inverted":
        return None if after <= before - case.bar else f"gained {after - before:.1%}"
    if after - before < case.bar:
        return f"gained {after - before:.1%}, bar {case.bar:.0%}"
    return f"ended at {after:.1%}, bar {MIN_FINAL:.0%}" if case.bar > 0.1 and after < MIN_FINAL else None


def table(title: str, curves: dict[tuple[Case, int], Points]) -> Iterator[str]:
    """One line a case: before, after and gain of each seed, in percent and points."""
    seeds = sorted({seed for _, seed in curves})
    yield from (f"## {title}", "", f"| case | steps | {' | '.join(f'seed {seed}' for seed in seeds)} | missed |")
    yield "|" + "---|" * (3 + len(seeds))
    for case in dict.fromkeys(case for case, _ in curves):
        runs = {seed: curves[case, seed] for seed in seeds}
        cells = [
            f"{100 * p[0][1]:.1f} to {100 * p[-1][1]:.1f}: {100 * (p[-1][1] - p[0][1]):+.1f}" for p in runs.values()
        ]
        found = [f"seed {seed} {text}" for seed, points in runs.items() if (text := missed(case, points))]
        yield f"| {case.name} | {case.steps} | {' | '.join(cells)} | {'; '.join(found)} |"
    yield ""


def main() -> int:
    parser = argparse.ArgumentParser()
    every = {case.name: case for case in (*ONLINE, *CONTROLS, *OFFLINE)}
    parser.add_argument("--cases", nargs="+", choices=every, default=list(every))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=int, default=2, help="runs side by side, one core each")
    parser.add_argument("--folder", type=Path, default=Path("runs/learning"))
    parser.add_argument("--warm-start", type=int, help="only make this seed's warm start")
    options = parser.parse_args()
    folder = options.folder.absolute()
    if options.warm_start is not None:
        warm_start(folder / f"sft-{options.warm_start}", options.warm_start)
        return 0
    families: dict[str, tuple[tuple[Case, ...], Callable[..., Points]]] = {
        "Online": (ONLINE, curve), "Controls": (CONTROLS, control_curve), "Offline": (OFFLINE, preference_curve)
    }  # fmt: skip
    with ThreadPoolExecutor(options.runs) as pool:
        list(pool.map(partial(warmed, folder), [s for s in options.seeds if not (folder / f"sft-{s}.done").exists()]))
        jobs = {
            title: {
                (case, seed): pool.submit(run, folder, case, seed)
                for case in cases if case.name in options.cases
                for seed in options.seeds
            }
            for title, (cases, run) in families.items()
        }  # fmt: skip
    found = {title: {key: job.result() for key, job in part.items()} for title, part in jobs.items() if part}
    for title, curves in found.items():
        print("\n".join(table(title, curves)), flush=True)
    gains = [(points[-1][1] - points[0][1]) / case.bar for (case, _), points in found.get("Online", {}).items()]
    print(f"ratio {min(gains, default=0):.2f}")
    return int(any(missed(case, points) for curves in found.values() for (case, _), points in curves.items()))


if __name__ == "__main__":
    sys.exit(main())
