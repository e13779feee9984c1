"""What DAPO and ScaleRL take into a step: refills, prompts left out for good, and shaping after the verdict."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_roles import CONTEXT, Scripted, samples

from algorithms.dapo import DAPO
from algorithms.scale_rl import ScaleRL
from hybridflow.batch_ref import BatchRef
from hybridflow.checkpoint.run_state import RunState
from hybridflow.schedule.intake import Intake, collect


class Prompts:
    """Draws positions 0, 1, 2, ... and remembers how many were asked for."""

    def __init__(self, positions: Sequence[int] = tuple(range(100))) -> None:
        self.left, self.draws = list(positions), list[int]()

    def __call__(self, count: int) -> BatchRef:
        self.draws.append(count)
        taken, self.left = self.left[:count], self.left[count:]
        return BatchRef(count, {}, {"position": np.array(taken)})


def scored(rewards: dict[int, Sequence[float]], abstained: Sequence[tuple[int, int]] = ()) -> Any:
    """Scores by position and sample; `abstained` names (position, sample)."""

    def score(requests: BatchRef) -> BatchRef:
        keys = list(zip(requests.scalar("position").tolist(), requests.scalar("sample").tolist(), strict=True))
        values = np.array([rewards[position][sample] for position, sample in keys], dtype=np.float32)
        return requests.with_scalars(rewards=values, abstained=np.array([key in abstained for key in keys]))

    return score


def step(algorithm: Any, prompts: Prompts, score: Any, count: int) -> Intake:
    return collect(algorithm, prompts, score, count)


def positions(rows: BatchRef) -> list[int]:
    return list(dict.fromkeys(rows.scalar("position").tolist()))


def dapo(**fields: Any) -> DAPO:
    return DAPO(DAPO.Config(**{"samples_per_prompt": 3, "old_logprobs": "rollout", **fields}), CONTEXT)


def scale_rl(**fields: Any) -> ScaleRL:
    return ScaleRL(ScaleRL.Config(**{"samples_per_prompt": 3, "old_logprobs": "rollout", **fields}), CONTEXT)


def test_dapo_draws_as_many_prompts_again_as_had_no_signal() -> None:
    rewards = {0: [1, 1, 1], 1: [1, 0, 0], 2: [0, 0, 0], 3: [0, 0, 0], 4: [0, 1, 0], 5: [1, 1, 0], 6: [1, 0, 1]}
    prompts = Prompts()
    taken = step(dapo(), prompts, scored(rewards), 3)
    assert prompts.draws == [3, 2, 1]
    assert positions(taken.rows) == [1, 4, 5]
    assert positions(taken.scored) == [0, 1, 2, 3, 4, 5]
    assert len(set(taken.rows.scalar("group").tolist())) == 3


def test_dapo_stops_drawing_at_its_bound() -> None:
    prompts = Prompts()
    taken = step(dapo(max_draws=2), prompts, scored({p: [0, 0, p == 1] for p in range(9)}), 3)
    assert prompts.draws == [3, 2] and positions(taken.rows) == [1]
    assert DAPO.max_draws(DAPO.Config(max_draws=1)) == 1


def test_samples_that_were_not_judged_give_no_signal() -> None:
    """Position 0 differs only in a sample that was not judged; of position 1 a single one was judged."""
    rewards = {0: [1, 1, 0], 1: [1, 0, 0], 2: [1, 0, 0]}
    taken = step(dapo(max_draws=1), Prompts(), scored(rewards, [(0, 2), (1, 1), (1, 2)]), 3)
    assert positions(taken.rows) == [2]


def test_the_verdict_reads_raw_scores_and_the_advantage_shaped_ones(tmp_path: Path) -> None:
    """Limit 8, buffer 4: the penalty of 5, 6, 8 tokens is 1/4, 1/2, 1 times overlong_penalty. Group 0 differs in its
    lengths alone and is refused; in group 1 the shaped scores are 0.75, 1, -1."""
    algorithm = dapo(overlong_buffer=4, overlong_penalty=1.0)
    made = samples([1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1], [[1] * n for n in (5, 6, 8, 5, 3, 8)])
    run = Scripted(tmp_path)
    group_0, group_1 = run.put(made).group_by("group")
    assert (algorithm.accept(group_0), algorithm.accept(group_1)) == ("refill", "keep")
    rows = algorithm.experience(group_1, run.roles)
    shaped = [0.75, 1.0, -1.0]
    spread = statistics.stdev(shaped) + 1e-6
    wanted = [(value - statistics.mean(shaped)) / spread for value in shaped]
    assert rows.scalar("advantages").tolist() == pytest.approx(wanted, rel=1e-12)
    assert rows.scalar("rewards").tolist() == [1, 1, 0]  # what metrics and the record show


def test_half_the_penalty_is_half_the_shaping(tmp_path: Path) -> None:
    run, made = Scripted(tmp_path), samples([0, 0], [0, 0], [[1] * 8, [1] * 4])
    shaped = [float(dapo(overlong_buffer=4, overlong_penalty=p).rewards(run.put(made))[0]) for p in (1.0, 0.5)]
    assert shaped == [-1.0, -0.5]
    assert dapo(overlong_buffer=0).rewards(run.put(made)).tolist() == [0.0, 0.0]


def test_the_buffer_is_by_default_a_fifth_of_the_limit(tmp_path: Path) -> None:
    """Limit 8: one token, so that only a response of the whole limit pays, and it pays all."""
    run, made = Scripted(tmp_path), samples([0, 0], [0, 0], [[1] * 8, [1] * 7])
    assert dapo().rewards(run.put(made)).tolist() == [-1.0, 0.0]


def test_a_buffer_longer_than_a_response_is_refused() -> None:
    [line] = DAPO.problems_in(DAPO.Config(overlong_buffer=9), CONTEXT)
    assert line.startswith("overlong_buffer: found 9; allowed: at most 8, rollout.sampling.max_response_tokens")
    assert DAPO.problems_in(DAPO.Config(overlong_buffer=8), CONTEXT) == []


def test_scale_rl_drops_groups_without_a_signal_and_does_not_replace_them() -> None:
    prompts = Prompts()
    taken = step(scale_rl(), prompts, scored({0: [0, 0, 0], 1: [0, 1, 0], 2: [1, 1, 1]}), 3)
    assert prompts.draws == [3] and positions(taken.rows) == [1]


def test_a_prompt_that_is_solved_is_left_out_for_good_and_replaced() -> None:
    """Position 2 passes always, position 1 in two of three; a pass rate of 0.6 is enough here."""
    algorithm, score = scale_rl(solved_pass_rate=0.6), scored({0: [0, 1, 0], 1: [1, 1, 0], 2: [1, 1, 1], 3: [0, 0, 1]})
    step(algorithm, Prompts([0, 1, 2]), score, 3)
    assert algorithm.state_dict() == {"solved": [1, 2]}
    prompts = Prompts([1, 2, 0, 3, 1])
    taken = step(algorithm, prompts, score, 2)
    assert prompts.draws == [2, 2] and positions(taken.rows) == [0, 3]
    assert taken.metrics["group/skipped_prompts"].value == 2


def test_the_default_pass_rate_is_that_of_the_paper() -> None:
    nine = scale_rl(samples_per_prompt=10)
    step(nine, Prompts(), scored({0: [1] * 9 + [0], 1: [1] * 8 + [0, 0]}), 2)
    assert nine.state_dict() == {"solved": [0]}


def test_the_pass_rate_is_over_judged_samples() -> None:
    algorithm = scale_rl()
    step(algorithm, Prompts(), scored({0: [1, 1, 0], 1: [0, 0, 0]}, [(0, 2), (1, 0), (1, 1), (1, 2)]), 2)
    assert algorithm.state_dict() == {"solved": [0]}


def test_the_history_survives_a_checkpoint(tmp_path: Path) -> None:
    algorithm = scale_rl()
    step(algorithm, Prompts(), scored({p: [1, 1, 1] for p in range(4)}), 3)
    RunState(step=1, config={}, schedule={"algorithm": algorithm.state_dict()}).save(tmp_path)
    resumed = scale_rl()
    resumed.load_state_dict(json.loads((tmp_path / "run_state.json").read_text())["schedule"]["algorithm"])
    assert resumed.solved == algorithm.solved == {0, 1, 2}


def test_when_everything_is_solved_nothing_is_sampled() -> None:
    algorithm, score = scale_rl(max_draws=3), scored({p: [1, 1, 1] for p in range(4)})
    algorithm.solved = set(range(100))
    taken = step(algorithm, Prompts(), score, 4)
    assert (taken.rows.num_rows, taken.scored.num_rows) == (0, 0)
