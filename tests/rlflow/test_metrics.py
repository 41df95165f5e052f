"""Metrics become one number over ranks and updates as each of them says, whatever it is called."""

from __future__ import annotations

from rlflow.metrics import Metric, over_ranks, over_updates, values_of


def test_parts_of_ranks_are_added_or_the_largest_of_them_is_kept():
    one = {"share_max": Metric(1.0), "largest": Metric(5.0, "max")}
    other = {"share_max": Metric(2.0), "largest": Metric(3.0, "max"), "of_one_rank": Metric(7.0)}
    assert values_of(over_ranks([one, other])) == {"share_max": 3.0, "largest": 5.0, "of_one_rank": 7.0}


def test_updates_have_a_mean_a_largest_or_a_first():
    updates = [
        {"mean": Metric(value), "max": Metric(value, "sum", "max"), "first": Metric(value, "max", "first")}
        for value in (2.0, 6.0, 1.0)
    ]
    assert over_updates(updates) == {"mean": 3.0, "max": 6.0, "first": 2.0}
