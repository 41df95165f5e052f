"""Golden values are worked out by hand beside each test, and hold for float32 and float64 rewards."""

import numpy as np
import pytest

from rlflow.algorithms.advantages import (
    combine_rewards,
    compute_advantages,
    gae,
    has_signal,
    soft_overlong_penalty,
    token_advantages,
    whiten,
)
from rlflow.algorithms.kl_reward import adapt_kl_coef, kl_penalty
from rlflow.recipe import algorithm_of

NAN = np.nan
ONE_GROUP = np.zeros(4, dtype=int)


@pytest.fixture(params=[np.float32, np.float64], ids=["fp32", "fp64"])
def array(request):
    """Makes an array of the tested precision."""
    return lambda values: np.array(values, dtype=request.param)


def equal(actual, expected) -> None:
    """All sums are in float64: what a golden value loses, its float32 input had lost."""
    assert np.asarray(actual).dtype == np.float64
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-9)


def block(**fields):
    return algorithm_of("dr_grpo", advantage={"eps": 1e-12, **fields}).advantage


def test_grpo_subtracts_the_groups_mean_and_divides_by_its_standard_deviation(array):
    # [1, 0, 0, 0]: mean 1/4, sum of squares 3/4, variance 1/4 with ddof 1 and 3/16 with ddof 0.
    rewards = array([[1, 0, 0, 0], [2, 4, 2, 4]])
    sample = compute_advantages(rewards, block(scale="group_std", ddof=1))
    population = compute_advantages(rewards, block(scale="group_std", ddof=0))
    third = 1 / np.sqrt(3)
    equal(sample[0], [1.5, -0.5, -0.5, -0.5])
    equal(sample[1], np.array([-1, 1, -1, 1]) / np.sqrt(4 / 3))
    equal(population[0], [3 * third, -third, -third, -third])
    equal(population[1], [-1, 1, -1, 1])


def test_eps_is_added_to_the_standard_deviation(array):
    advantages = compute_advantages(array([[1.0, -1.0]]), block(scale="group_std", ddof=0, eps=1.0))
    equal(advantages, [[0.5, -0.5]])


def test_dr_grpo_divides_by_nothing(array):
    advantages = compute_advantages(array([[1, 0, 0, 0]]), block())
    equal(advantages, [[0.75, -0.25, -0.25, -0.25]])


def test_rloo_subtracts_the_mean_of_the_others(array):
    # Others of 1: (2 + 6) / 2 = 4. Of 2: 3.5. Of 6: 1.5.
    advantages = compute_advantages(array([[1, 2, 6]]), block(estimator="leave_one_out"))
    equal(advantages, [[-3, -1.5, 4.5]])


def test_rloo_by_its_two_formulas():
    rewards = np.random.default_rng(0).normal(size=(5, 7))
    leave_one_out = compute_advantages(rewards, block(estimator="leave_one_out"))
    scaled_mean = 7 / 6 * compute_advantages(rewards, block(estimator="group_mean"))
    np.testing.assert_allclose(leave_one_out, scaled_mean, atol=1e-12)


def test_batch_mean_and_batch_std_are_over_all_groups(array):
    # 0, 2, 4, 6: mean 3, squares 9 + 1 + 1 + 9 = 20, variance 5 with ddof 0.
    rewards = array([[0.0, 2.0], [4.0, 6.0]])
    advantages = compute_advantages(rewards, block(estimator="batch_mean", scale="batch_std", ddof=0))
    equal(advantages, np.array([[-3, -1], [1, 3]]) / np.sqrt(5))
    grouped = compute_advantages(rewards, block(estimator="group_mean", scale="batch_std", ddof=0))
    equal(grouped, np.array([[-1, 1], [-1, 1]]) / np.sqrt(5))


@pytest.mark.parametrize("estimator", ["group_mean", "leave_one_out", "batch_mean"])
@pytest.mark.parametrize("scale", ["none", "group_std", "batch_std"])
def test_unscored_rollouts_get_zero_and_change_nobody_elses_advantage(estimator, scale):
    fields = block(estimator=estimator, scale=scale, ddof=1)
    with_unscored = compute_advantages(np.array([[3.0, NAN, 1.0, 5.0, NAN]]), fields)
    without = compute_advantages(np.array([[3.0, 1.0, 5.0]]), fields)
    np.testing.assert_allclose(with_unscored[0, [0, 2, 3]], without[0])
    np.testing.assert_array_equal(with_unscored[0, [1, 4]], 0.0)


@pytest.mark.parametrize("estimator", ["group_mean", "leave_one_out", "batch_mean"])
@pytest.mark.parametrize("scale", ["none", "group_std", "batch_std"])
@pytest.mark.parametrize("row", [[NAN, NAN], [7.0, NAN]])
def test_a_batch_of_fewer_than_two_scored_rollouts_has_no_advantage(estimator, scale, row):
    advantages = compute_advantages(np.array([row]), block(estimator=estimator, scale=scale))
    np.testing.assert_array_equal(advantages, 0.0)


def test_gae_by_hand(array):
    # gamma 1/2, lambda 1/2. deltas: 1 + 1/2*4 - 2 = 1; 0 + 1/2*6 - 4 = -1; 2 + 0 - 6 = -4.
    # A_2 = -4; A_1 = -1 + 1/4 * -4 = -2; A_0 = 1 + 1/4 * -2 = 1/2. R = A + V.
    advantages, returns = gae(array([1, 0, 2]), array([2, 4, 6]), 0.5, 0.5)
    equal(advantages, [0.5, -2, -4])
    equal(returns, [2.5, 2, 2])


def test_gae_with_lambda_one_is_the_return_minus_the_value_and_with_zero_the_td_error():
    rewards, values = np.random.default_rng(1).normal(size=(2, 6))
    monte_carlo, returns = gae(rewards, values, 1.0, 1.0)
    np.testing.assert_allclose(returns, np.cumsum(rewards[::-1])[::-1])
    np.testing.assert_allclose(monte_carlo, returns - values)
    one_step, _ = gae(rewards, values, 0.9, 0.0)
    np.testing.assert_allclose(one_step, rewards + 0.9 * np.append(values[1:], 0.0) - values)


def test_padding_on_the_right_does_not_change_gae():
    rewards, values = np.random.default_rng(2).normal(size=(2, 4))
    padded, _ = gae(np.stack([np.append(rewards, [0, 0])]), np.stack([np.append(values, [0, 0])]), 0.9, 0.8)
    alone, _ = gae(rewards, values, 0.9, 0.8)
    np.testing.assert_allclose(padded[0, :4], alone)


def test_whitening_is_over_the_elements_of_all_arrays(array):
    # 1, 2, 6: mean 3, squares 4 + 1 + 9 = 14; variance 7 with ddof 1, 14/3 with ddof 0.
    first, second = whiten([array([1.0, 2.0]), array([6.0])], ddof=1, eps=0.0)
    equal(first, np.array([-2, -1]) / np.sqrt(7))
    equal(second, np.array([3]) / np.sqrt(7))
    first, _ = whiten([array([1.0, 2.0]), array([6.0])], ddof=0, eps=1 / 3)
    equal(first, np.array([-2, -1]) / np.sqrt(5))


def test_whitening_nothing_one_element_or_constants_gives_zeros():
    assert whiten([]) == []
    np.testing.assert_array_equal(whiten([np.array([5.0]), np.zeros(0)])[0], [0.0])
    np.testing.assert_array_equal(whiten([np.full(3, 5.0)])[0], np.zeros(3))


def test_group_estimators_give_every_token_the_advantage_of_the_penalised_reward(array):
    # Rewards 1 and 3 less penalties 0.5 and 1: 0.5 and 2, mean 1.25.
    penalties = [array([0.25, 0.25]), array([1.0, -0.5, 0.5])]
    advantages, returns = token_advantages(array([1.0, 3.0]), ONE_GROUP[:2], penalties, block())
    equal(advantages[0], [-0.75] * 2)
    equal(advantages[1], [0.75] * 3)
    equal(returns[1], [2.0] * 3)


@pytest.mark.parametrize("estimator", ["group_mean", "leave_one_out", "batch_mean"])
def test_groups_of_any_size_have_the_advantages_that_each_has_alone_or_all_have_together(array, estimator):
    rewards, group_of = array([1, 0, 4, 2, 0, 7]), np.array([3, 3, 5, 5, 5, 9])
    penalties = [np.zeros(1)] * 6
    fields = block(estimator=estimator, scale="batch_std" if estimator == "batch_mean" else "group_std")
    advantages, _ = token_advantages(rewards, group_of, penalties, fields)
    if estimator == "batch_mean":
        # Mean 14 / 6; squares 70 - 6 (7/3)^2 = 112 / 3, variance 112 / 15.
        expected = (rewards - 7 / 3) / np.sqrt(112 / 15)
    elif estimator == "group_mean":
        # Means 1/2 and 2, standard deviations sqrt(1/2) and 2; one alone is its own mean.
        expected = np.array([0.5**0.5, -(0.5**0.5), 1, 0, -1, 0])
    else:
        expected = np.array([1 / 0.5**0.5, -1 / 0.5**0.5, 1.5, 0, -1.5, 0])
    np.testing.assert_allclose(np.concatenate(advantages), expected, rtol=1e-6, atol=1e-6)


def test_reinforce_plus_plus_subtracts_from_a_token_the_penalties_from_it_on(array):
    # A_t = r - sum of penalties from t on (arXiv 2501.03262): 5 - (1 + 2 + 4), 5 - (2 + 4), 5 - 4.
    penalties = [array([1.0, 2.0, 4.0])]
    advantages, _ = token_advantages(array([5.0]), ONE_GROUP[:1], penalties, block(estimator="return"))
    equal(advantages[0], [-2, -1, 1])
    # Whitened: mean -2/3, squares 16/9 + 1/9 + 25/9 = 14/3, variance 7/3.
    whitened, _ = token_advantages(array([5.0]), ONE_GROUP[:1], penalties, block(estimator="return", whiten=True))
    equal(whitened[0], np.array([-4, -1, 5]) / 3 / np.sqrt(7 / 3 + 1e-8))


def test_what_follows_a_token_is_discounted(array):
    # Token rewards -1, -2, 5 - 4 = 1; gamma 1/2: 1; -2 + 1/2 = -1.5; -1 - 0.75 = -1.75.
    penalties = [array([1.0, 2.0, 4.0]), array([0.0])]
    fields = block(estimator="return", gamma=0.5)
    advantages, returns = token_advantages(array([5.0, 2.0]), ONE_GROUP[:2], penalties, fields)
    equal(advantages[0], [-1.75, -1.5, 1])
    equal(advantages[1], [2])
    equal(returns[0], advantages[0])


def test_ppo_places_the_reward_on_the_last_token_and_the_penalty_on_each(array):
    # Token rewards -0.5, 2 - 1 = 1; values 1, 3; gamma 1, lambda 1/2: deltas -0.5 + 3 - 1 = 1.5, 1 - 3 = -2.
    advantages, returns = token_advantages(
        array([2.0]),
        ONE_GROUP[:1],
        [array([0.5, 1.0])],
        block(estimator="gae", gae_lambda=0.5),
        [array([1.0, 3.0])],
    )
    equal(advantages[0], [0.5, -2.0])
    equal(returns[0], [1.5, 1.0])


@pytest.mark.parametrize("estimator", ["group_mean", "return", "gae"])
def test_unscored_and_empty_completions_stay_zero_through_whitening(estimator):
    rewards = np.array([1.0, NAN, 4.0, 2.0])
    lengths = [2, 3, 1, 0]
    penalties = [np.full(n, 0.1) for n in lengths]
    values = [np.full(n, 0.5) for n in lengths]
    fields = block(estimator=estimator, whiten=True)
    advantages, _ = token_advantages(rewards, ONE_GROUP, penalties, fields, values)
    assert [len(a) for a in advantages] == lengths
    np.testing.assert_array_equal(advantages[1], 0.0)
    scored = np.concatenate([advantages[0], advantages[2]])
    np.testing.assert_allclose([scored.mean(), scored.var(ddof=1)], [0.0, 1.0], atol=1e-6)


def test_gae_without_values_says_what_is_missing():
    with pytest.raises(ValueError, match="needs a value"):
        token_advantages(np.array([1.0]), ONE_GROUP[:1], [np.zeros(2)], block(estimator="gae"))


def test_soft_overlong_punishment_by_dapos_numbers():
    # 20480 tokens of which 4096 are the buffer: 0 up to 16384, -1/2 at 18432, -1 at the end.
    lengths = np.array([1, 16384, 17408, 18432, 20480, 20500])
    np.testing.assert_allclose(soft_overlong_penalty(lengths, 20480, 4096), [0, 0, -0.25, -0.5, -1, -1])


def test_rewards_combine_by_weight_without_those_that_abstain(array):
    rewards = array([[[1.0, NAN, NAN, 2.0]], [[3.0, 4.0, NAN, NAN]]])
    failed = np.array([[[False] * 4], [[False, False, False, True]]])
    combined = combine_rewards(rewards, failed, array([1.0, 0.5]))
    equal(combined, [[2.5, 2.0, NAN, NAN]])


def test_normalising_each_reward_first_keeps_a_large_one_from_hiding_a_small_one(array):
    # Each is +-1 after normalisation with ddof 0, whatever its scale.
    rewards = array([[[100.0, -100.0]], [[0.0, 1.0]]])
    combined = combine_rewards(
        rewards, np.zeros_like(rewards, dtype=bool), array([1.0, 2.0]), "normalize_each", ddof=0, eps=1e-12
    )
    equal(combined, [[1 - 2, -1 + 2]])


def test_normalising_the_sum_is_over_the_batch(array):
    rewards = array([[[0.0, 2.0], [4.0, 6.0]]])
    combined = combine_rewards(
        rewards, np.zeros_like(rewards, dtype=bool), array([1.0]), "normalize_sum", ddof=0, eps=1e-12
    )
    equal(combined, np.array([[-3, -1], [1, 3]]) / np.sqrt(5))


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [([1, 0], True), ([1, 1, 1], False), ([1, NAN], False), ([NAN, NAN], False), ([0, NAN, 1], True), ([2], False)],
)
def test_a_group_has_signal_when_its_scored_rewards_differ(rewards, expected):
    assert has_signal(np.array(rewards, dtype=np.float32)) is expected


def test_kl_estimators_in_the_reward_by_hand(array):
    # Policy 1/2, reference 1/4: log-ratio ln 2; r = 1/2, so k3 = 1/2 - 1 + ln 2.
    logprobs, ref_logprobs = np.log(array([0.5])), np.log(array([0.25]))
    tolerance = {"rtol": 1e-6 if logprobs.dtype == np.float32 else 1e-14}
    np.testing.assert_allclose(kl_penalty("k1", logprobs, ref_logprobs), [0.6931471805599453], **tolerance)
    np.testing.assert_allclose(kl_penalty("k2", logprobs, ref_logprobs), [0.2402265069591007], **tolerance)
    np.testing.assert_allclose(kl_penalty("k3", logprobs, ref_logprobs), [0.1931471805599453], **tolerance)
    np.testing.assert_allclose(kl_penalty("abs", logprobs, ref_logprobs), [0.6931471805599453], **tolerance)
    np.testing.assert_allclose(kl_penalty("abs", ref_logprobs, logprobs), [0.6931471805599453], **tolerance)


def test_k3_in_the_reward_is_finite_far_from_the_reference_as_it_is_in_the_loss():
    far, near = np.array([-800.0, -0.1]), np.array([-0.1, -800.0])
    np.testing.assert_allclose(kl_penalty("k3", far, near), [np.expm1(20.0) - 20, np.expm1(-20.0) + 20])


def test_the_adaptive_coefficient_moves_towards_the_target_by_a_bounded_share():
    # Error (8 - 6) / 6 is cut to 0.2; 100 samples of a horizon of 1000: 1 + 0.2 * 0.1.
    assert adapt_kl_coef(0.1, kl=8.0, target=6.0, horizon=1000, num_samples=100) == pytest.approx(0.1 * 1.02)
    assert adapt_kl_coef(0.1, kl=5.7, target=6.0, horizon=1000, num_samples=100) == pytest.approx(0.1 * 0.995)
    assert adapt_kl_coef(0.1, kl=0.0, target=6.0, horizon=1000, num_samples=100) == pytest.approx(0.1 * 0.98)
