"""PPO's numbers, worked out by hand for two samples; the second has a span that was not sampled in its middle.

Row 0: k1 = old - ref = 0.5, -1, 0; values 0.2, 0.4, 0.1; score 1. Row 1: k1 = 0, 1; values 0.5, 0.3; score 0. With a
KL coefficient of 0.1 the token rewards are -0.05, 0.1, 1 and 0, -0.1. With gamma 1 and lambda 0.5:

  delta  0.15 -0.2  0.9 | -0.2 -0.4      A  0.275 0.25 0.9 | -0.4 -0.4      R  0.475 0.65 1 | 0.1 -0.1
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from scripted_roles import CONTEXT, Scripted, samples

from algorithms.losses import PolicyLoss, ValueLoss
from algorithms.objectives import ClippedRatio
from algorithms.ppo import PPO
from algorithms.token_advantages import Moments, whitened
from hybridflow.batch import Batch

MASKS = [[1, 1, 1], [1, 0, 0, 1]]
GIVEN = {
    "given_old_logprobs": [[-1.0, -2.0, -0.5], [-1.0, -1.0]],
    "given_ref_logprobs": [[-1.5, -1.0, -0.5], [-1.0, -2.0]],
    "given_values": [[0.2, 0.4, 0.1], [0.5, 0.3]],
    "rollout_logprobs": [[-1.0, -2.0, -0.5], [-1.0, -1.0]],
}
TOKEN_REWARDS = [[-0.05, 0.1, 1.0], [0.0, -0.1]]
ADVANTAGES = [[0.275, 0.25, 0.9], [-0.4, -0.4]]
RETURNS = [[0.475, 0.65, 1.0], [0.1, -0.1]]
WHITENED = [[0.27501, 0.22917, 1.42088], [-0.96253, -0.96253]]
"""Mean 0.125, unbiased variance 1.19 / 4 over the five tokens."""


def batch(abstained: tuple[int, ...] = ()) -> Batch:
    return samples([1.0, 0.0], [0, 1], MASKS, abstained=abstained, given=GIVEN)


def ppo(**fields: Any) -> PPO:
    return PPO(PPO.Config(**{"lam": 0.5, "kl_reward_coef": 0.1, "epochs": 1, **fields}), CONTEXT)


@pytest.fixture
def run(tmp_path: Path) -> Scripted:
    return Scripted(tmp_path, models=("actor", "critic", "reference"))


def close(found: list[list[float]], wanted: list[list[float]]) -> bool:
    return [pytest.approx(row, abs=1e-5) for row in wanted] == found


def test_rewards_advantages_and_returns(run: Scripted) -> None:
    """The KL penalty lowers the reward where the policy is above the reference; the score is on the last sampled token
    of each row, behind the span that was not sampled."""
    rows = ppo(whiten_advantages=False).experience(run.put(batch()), run.roles)
    assert close(run.token_rows(rows, "token_rewards"), TOKEN_REWARDS)
    assert close(run.token_rows(rows, "advantages"), ADVANTAGES)
    assert close(run.token_rows(rows, "returns"), RETURNS)
    for name in ("token_rewards", "advantages", "returns"):
        column = run.fetch(rows, name).ragged(name).flat
        mask = run.fetch(rows, "response_mask").ragged("response_mask").flat
        assert column[~mask].abs().sum() == 0, name


def test_advantages_are_whitened_over_the_tokens_of_the_step(run: Scripted) -> None:
    rows = ppo().experience(run.put(batch()), run.roles)
    assert close(run.token_rows(rows, "advantages"), WHITENED)
    assert close(run.token_rows(rows, "returns"), RETURNS)


def test_a_row_that_was_not_judged_is_outside_it_all(run: Scripted) -> None:
    """Alone, row 0 has advantages of mean 0.475 and unbiased variance 0.135625."""
    rows = ppo().experience(run.put(batch(abstained=(1,))), run.roles)
    assert rows.scalar("row").tolist() == [0]
    assert close(run.token_rows(rows, "advantages"), [[-0.54308, -0.61096, 1.15404]])


def test_without_a_penalty_there_is_no_reference(run: Scripted) -> None:
    assert PPO.required_roles(PPO.Config(kl_reward_coef=0.0)) == ("actor", "rollout", "reward", "critic")
    assert "reference" in PPO.required_roles(PPO.Config(kl_reward_coef=0.0, kl_loss_coef=0.1))
    rows = ppo(kl_reward_coef=0.0, whiten_advantages=False).experience(run.put(batch()), run.roles)
    assert close(run.token_rows(rows, "token_rewards"), [[0, 0, 1.0], [0, 0]])
    assert run.worker("reference").columns == []


def test_metrics_of_a_batch_and_the_adaptive_coefficient(run: Scripted) -> None:
    """KL of a sequence: (-0.5 + 1) / 2 = 0.25, over twice the target, so the error is held at 0.2 and the coefficient
    grows by 0.2 * 2 / 10. Explained variance: 1 - 0.238 / 0.153."""
    algorithm = ppo(adaptive_kl={"target": 0.1, "horizon": 10})
    metrics = algorithm.update(algorithm.experience(run.put(batch()), run.roles), run.roles, step=0)
    assert metrics["kl/reward_kl"].value == pytest.approx(0.25, abs=1e-6)
    assert metrics["kl/coefficient"].value == pytest.approx(0.1)
    assert metrics["critic/vf_explained_var"].value == pytest.approx(1 - 0.238 / 0.153, abs=1e-5)
    assert algorithm.kl_coef == pytest.approx(0.104, rel=1e-6)
    assert algorithm.penalty.coef == algorithm.kl_coef
    resumed = ppo(adaptive_kl={"target": 0.1, "horizon": 10})
    resumed.load_state_dict(algorithm.state_dict())
    assert resumed.kl_coef == algorithm.kl_coef


def test_the_coefficient_falls_below_the_target_and_stays_where_it_is_fixed(run: Scripted) -> None:
    adaptive, fixed = ppo(adaptive_kl={"target": 0.5, "horizon": 10}), ppo()
    for algorithm in (adaptive, fixed):
        algorithm.update(algorithm.experience(run.put(batch()), run.roles), run.roles, step=0)
    assert adaptive.kl_coef == pytest.approx(0.1 * (1 - 0.2 * 2 / 10), rel=1e-6)
    assert fixed.kl_coef == 0.1


def test_the_actor_waits_for_the_critic(run: Scripted) -> None:
    algorithm = ppo(critic_warmup_steps=2, epochs=3, mini_batches=2)
    for step, actor_steps in ((0, 0), (1, 0), (2, 6)):
        metrics = algorithm.update(algorithm.experience(run.put(batch()), run.roles), run.roles, step)
        assert len(run.worker("actor").updates) == actor_steps
        assert len(run.worker("critic").updates) == 6 * (step + 1)
        assert ("actor/loss" in metrics) == (actor_steps > 0) and "critic/loss" in metrics


def test_actor_and_critic_learn_from_the_same_rows(run: Scripted) -> None:
    algorithm = ppo(epochs=2, mini_batches=2, value_clip=0.3, clip_high=0.3, dual_clip=3.0, entropy_coef=0.01)
    algorithm.update(algorithm.experience(run.put(batch()), run.roles), run.roles, step=5)
    sent = {name: [part for [part] in run.worker(name).updates] for name in ("actor", "critic")}
    order = {name: [rows.tensor("row").tolist() for rows, _ in parts] for name, parts in sent.items()}
    assert order["actor"] == order["critic"]
    assert sorted(row for part in order["actor"] for row in part) == [0, 0, 1, 1]
    losses = {name: {loss for _, loss in parts} for name, parts in sent.items()}
    assert losses["critic"] == {ValueLoss(0.3)}
    assert losses["actor"] == {PolicyLoss(CONTEXT.temperature, ClippedRatio(0.2, 0.3, 3.0), entropy_coef=0.01)}
    for rows, _ in sent["actor"]:
        weights = rows.tensor("loss_weight") * rows.ragged("response_mask").padded().sum(1)
        assert weights.sum() == pytest.approx(1.0)


def test_the_penalty_is_on_the_log_probs_that_stand_for_the_sampling_policy(run: Scripted) -> None:
    made = batch()
    moved = made.ragged("rollout_logprobs")
    mask = made.ragged("response_mask").flat
    moved.flat[mask] = moved.flat[mask] - 10
    penalised = {
        source: run.token_rows(ppo(old_logprobs=source).experience(run.put(made), run.roles), "token_rewards")
        for source in ("recompute", "rollout", "detach")
    }
    assert close(penalised["recompute"], TOKEN_REWARDS)
    assert close(penalised["rollout"], [[r + 1.0 for r in row] for row in TOKEN_REWARDS])
    assert penalised["detach"] == penalised["rollout"]


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"adaptive_kl": {}, "kl_reward_coef": 0.0}, "adaptive_kl: steers kl_reward_coef, which is 0"),
        ({"old_logprobs": "detach"}, "old_logprobs: detach makes every ratio 1, found epochs=4"),
        ({"kl_loss_coef": 0.1, "kl_estimator": "k1"}, "kl_estimator: the gradient of k1"),
        ({"correction": {}, "old_logprobs": "rollout"}, "correction: old_logprobs=rollout makes its ratio 1"),
        ({"rejection": {"bound": 1.0}, "old_logprobs": "rollout"}, "rejection: compares old with rollout log-probs"),
    ],
)
def test_combinations_that_make_no_sense(fields: dict[str, Any], found: str) -> None:
    [line] = PPO.problems(PPO.Config(**fields))
    assert line.startswith(found)


def test_whitening_survives_a_variance_that_rounds_below_zero(run: Scripted) -> None:
    """400 numbers of which one is the next float32: their sum of squares comes out 0.06 below n times the squared
    mean, so that its root would not be real."""
    same = [[975927.0625] * 200 for _ in range(2)]
    same[0][0] = 975927.125
    made = samples([0.0, 0.0], [0, 1], [[1] * 200] * 2, given={"advantages": same})
    sums = run.roles.critic.reduce(Moments("advantages"), run.put(made)).result()
    assert sums["sum_sq"] - sums["sum"] ** 2 / sums["count"] < -0.01, "the example has lost its point"
    rows = whitened(run.put(made), run.roles.critic)
    found = run.fetch(rows, "advantages").ragged("advantages").flat
    assert found.dtype == torch.float32 and found.isfinite().all()
