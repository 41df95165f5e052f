"""OPO's, ReMax's and MaxRL's advantages and the clip of advantages: worked out by hand beside each test."""

import numpy as np
import pytest

from rlflow.algorithms.advantages import compute_advantages, token_advantages
from rlflow.plugins import PluginError
from rlflow.recipe import algorithm_of

NAN = np.nan


def block(**fields):
    return algorithm_of("dr_grpo", advantage={"eps": 1e-12, **fields}).advantage


def of_tokens(rewards, group_of, trained, fields, **given):
    """The first advantage of every rollout."""
    penalties = [np.zeros(count) for count in trained]
    advantages, _ = token_advantages(np.array(rewards), np.array(group_of), penalties, fields, **given)
    return [float(a[0]) if len(a) else None for a in advantages]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_opos_baseline_weighs_rewards_with_lengths(dtype):
    # (1 * 2 + 3 * 6) / 4 = 5.
    rewards, lengths = np.array([[2.0, 6.0]], dtype=dtype), np.array([[1.0, 3.0]])
    np.testing.assert_allclose(compute_advantages(rewards, block(estimator="length_weighted_mean"), lengths), [[-3, 1]])


def test_opo_with_equal_lengths_is_the_groups_mean():
    rewards = np.random.default_rng(0).normal(size=(3, 5))
    optimal = compute_advantages(rewards, block(estimator="length_weighted_mean"), np.full((3, 5), 7.0))
    np.testing.assert_allclose(optimal, compute_advantages(rewards, block()), atol=1e-12)


def test_opo_makes_the_advantages_of_a_groups_tokens_sum_to_zero():
    lengths = [3, 1, 5, 2]
    advantages = of_tokens([1.0, 0.0, 0.5, 2.0], [0, 0, 1, 1], lengths, block(estimator="length_weighted_mean"))
    assert advantages[0] * 3 + advantages[1] * 1 == pytest.approx(0.0)
    assert advantages[2] * 5 + advantages[3] * 2 == pytest.approx(0.0)


def test_opo_counts_what_was_written_and_is_not_trained():
    # A truncated rollout of 6 tokens without a loss token: (2 * 1 + 6 * 5) / 8 = 4.
    given = {"lengths": np.array([2, 6])}
    assert of_tokens([1.0, 5.0], [0, 0], [2, 0], block(estimator="length_weighted_mean"), **given) == [-3.0, None]


def test_remax_subtracts_the_reward_of_the_groups_greedy_rollout():
    is_baseline = np.array([False, False, True, False, True])
    rewards, groups = [3.0, 1.0, 2.5, 0.0, 1.0], [0, 0, 0, 1, 1]
    advantages = of_tokens(rewards, groups, [2, 2, 0, 1, 0], block(estimator="greedy"), is_baseline=is_baseline)
    assert advantages == [0.5, -1.5, None, -1.0, None]


def test_where_the_greedy_rollout_is_unscored_there_is_no_baseline_and_no_advantage():
    is_baseline = np.array([False, True, False, True])
    advantages = of_tokens(
        [3.0, NAN, NAN, 1.0], [0, 0, 1, 1], [1, 0, 1, 0], block(estimator="greedy"), is_baseline=is_baseline
    )
    assert advantages == [0.0, None, 0.0, None]


def test_maxrl_divides_by_the_share_that_succeeds():
    # Two of four succeed, then one of four: (1 - p) / p and -1.
    rewards = np.array([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    expected = [[1, -1, 1, -1], [-1, -1, -1, 3], [0, 0, 0, 0]]
    np.testing.assert_allclose(compute_advantages(rewards, block(scale="group_mean")), expected, atol=1e-9)


def test_maxrl_gives_the_gradient_of_the_log_success_rate():
    # Of a policy p = sigmoid(x) that succeeds or not: d log p / dx = 1 - p, and REINFORCE's mean of A d log pi / dx.
    p, n = 0.25, 8
    rewards = np.array([[1.0] * int(p * n) + [0.0] * int((1 - p) * n)])
    advantages = compute_advantages(rewards, block(scale="group_mean"))[0]
    scores = np.where(rewards[0] > 0, 1 - p, -p)
    assert np.mean(advantages * scores) == pytest.approx(1 - p)


def test_a_reward_below_zero_has_no_share_to_divide_by_and_is_named():
    with pytest.raises(PluginError, match=r"one of its rewards is -0\.5: give rewards of at least 0"):
        compute_advantages(np.array([[1.0, -0.5]]), block(scale="group_mean"))


@pytest.mark.parametrize("estimator", ["group_mean", "length_weighted_mean", "return"])
def test_advantages_are_cut_after_everything_else(estimator):
    plain = of_tokens([4.0, 0.0, 1.0], [0, 0, 0], [1, 1, 1], block(estimator=estimator, whiten=True))
    cut = of_tokens([4.0, 0.0, 1.0], [0, 0, 0], [1, 1, 1], block(estimator=estimator, whiten=True, clip=0.7))
    assert max(map(abs, plain)) > 0.7
    assert cut == pytest.approx([min(max(a, -0.7), 0.7) for a in plain])
