"""Estimates over problems: by hand, by counting all draws, by drawing many times."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from rlflow.evaluation_sets.estimates import estimate, majority_at_k, pass_at_k


@pytest.mark.parametrize(("num_samples", "num_passed"), [(5, 0), (5, 2), (6, 5), (4, 4)])
def test_pass_at_k_is_the_share_of_draws_of_k_samples_in_which_one_passes(num_samples: int, num_passed: int):
    samples = [True] * num_passed + [False] * (num_samples - num_passed)
    for k in range(1, num_samples + 1):
        draws = [any(draw) for draw in combinations(samples, k)]
        assert pass_at_k(num_samples, num_passed, k) == pytest.approx(sum(draws) / len(draws))


def test_a_k_beyond_the_samples_is_refused():
    with pytest.raises(ValueError, match="pass@4 needs at least 4 samples"):
        pass_at_k(3, 1, 4)
    with pytest.raises(ValueError, match="maj@4 needs at least 4 samples"):
        majority_at_k(["1"], [True], 4)


def test_the_interval_of_verdicts_is_wilsons():
    # 7 of 10, by hand: (0.7 + 3.8415 / 20) / (1 + 0.38415) = 0.6445, reach 1.95996 / 1.38415 * sqrt(0.021 + 0.0096037),
    # with n = 9 in the place of 10, because the variance of a sample divides by n - 1.
    found = estimate([1.0] * 7 + [0.0] * 3)
    center, reach = (0.7 + 3.841459 / 18) / (1 + 3.841459 / 9), 1.959964 / (1 + 3.841459 / 9)
    reach *= (0.7 * 0.3 / 9 + 3.841459 / (4 * 81)) ** 0.5
    assert (found.value, found.num_problems) == (pytest.approx(0.7), 10)
    assert (found.low, found.high) == (pytest.approx(center - reach, abs=1e-6), pytest.approx(center + reach, abs=1e-6))


def test_no_success_and_nothing_but_success_are_no_certainty():
    # The rule of three says 3 / n; Wilson z^2 / (n + z^2).
    none, all_ = estimate([0.0] * 100), estimate([1.0] * 100)
    assert (none.low, none.high) == (0.0, pytest.approx(3.841459 / 103.841459))
    assert (all_.low, all_.high) == (pytest.approx(1 - 3.841459 / 103.841459), 1.0)
    assert (estimate([0.5]).low, estimate([0.5]).high) == (
        pytest.approx(0.0546, abs=1e-3),
        pytest.approx(0.9454, abs=1e-3),
    )
    with pytest.raises(ValueError, match="no problems"):
        estimate([])


@pytest.mark.parametrize("samples", [1, 8])
def test_the_interval_holds_the_truth_as_often_as_it_says(samples: int):
    draw = np.random.default_rng(0)
    held, widths = 0, []
    for _ in range(400):
        ability = draw.beta(2, 2, size=60)
        found = estimate(list(draw.binomial(samples, ability) / samples))
        held += found.low <= 0.5 <= found.high
        widths.append(found.high - found.low)
    assert 0.92 <= held / 400 <= 0.98
    # The spread of a verdict is 0.5, of the mean of eight about sqrt(0.05 + 0.2 / 8) = 0.27.
    assert np.mean(widths) == pytest.approx(2 * 1.96 * (0.5 if samples == 1 else 0.274) / 60**0.5, rel=0.06)


@pytest.mark.parametrize(
    ("answers", "passed", "k", "expected"),
    [
        (["4", "4", "5"], [True, True, False], 3, 1.0),
        (["5", "5", "4"], [False, False, True], 3, 0.0),
        (["5", "4"], [False, True], 2, 0.5),
        (["1/2", "0.5", "3", "4"], [True, True, False, False], 4, 1.0),
        ([None, None, "4"], [False, False, True], 3, 1.0),
        ([None, None], [False, False], 2, 0.0),
        # Of the three pairs (5, 5) is wrong, (5, 4) twice a tie.
        (["5", "5", "4"], [False, False, True], 2, (0 + 0.5 + 0.5) / 3),
    ],
)
def test_the_most_frequent_answer_wins(answers: list, passed: list, k: int, expected: float):
    assert majority_at_k(answers, passed, k) == pytest.approx(expected)


def test_of_many_subsets_some_are_drawn():
    answers, passed = ["4"] * 12 + ["5"] * 8, [True] * 12 + [False] * 8
    # Of three of 20 the right one wins with two or three of 12: (C(12, 2) 8 + C(12, 3)) / C(20, 3).
    assert majority_at_k(answers, passed, 3) == pytest.approx((66 * 8 + 220) / 1140, abs=0.04)
    assert majority_at_k(answers, passed, 3) == majority_at_k(answers, passed, 3)
