from __future__ import annotations

import math

import pytest

from rlflow.tracking import lines


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.4567, "0.457"),
        (0.0123, "0.012"),
        (0.00123, "0.0012"),
        (12.346, "12.35"),
        (182.4, "182"),
        (-0.0033, "-0.0033"),
        (1e-6, "1.0e-06"),
        (123456.0, "1.2e+05"),
        (math.nan, "-"),
        (math.inf, "inf"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert lines.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(940, "940"), (1234, "1.2k"), (38_000, "38k"), (2.5e6, "2.5M"), (math.nan, "-")]
)
def test_counts_are_in_thousands_and_millions(value: float, text: str) -> None:
    assert lines.count(value) == text


def test_times_read_as_on_a_stopwatch_or_in_words() -> None:
    assert [lines.clock(s) for s in (7, 753, 3725)] == ["0:07", "12:33", "1:02:05"]
    assert [lines.duration(s) for s in (41, 720, 3725)] == ["41 s", "12 min", "1 h 2 min"]


def test_a_step_without_training_has_no_fields() -> None:
    assert lines.step_fields({"eval/heldout/pass@1": 0.5, "perf/tokens_per_s": 3.0, "time/step_s": 1.0}) == []


def test_only_the_first_known_loss_is_shown() -> None:
    fields = dict(lines.step_fields({"loss/sft": 1.0, "loss/total": 2.0, "perf/trained_tokens_per_s": 1500.0}))
    assert {label: value.strip() for label, value in fields.items()} == {"loss": "2", "tok/s": "1.5k"}


def test_the_loss_of_a_policy_gradient_is_not_shown() -> None:
    metrics = {"loss/policy": 1e-9, "loss/total": 1e-9, "reward/mean": 0.5, "completion/mean_tokens": 9.0}
    assert [label for label, _ in lines.step_fields(metrics)] == ["reward", "len"]
    assert lines.headline(metrics) == {"reward": 0.5, "len": 9.0}
    assert lines.headline({"loss/sft": 2.0, "entropy": 1.0}) == {"loss": 2.0}


def test_a_trend_goes_from_the_lowest_block_to_the_highest_and_has_gaps() -> None:
    assert lines.sparkline([0.0, math.nan, 3.5, 7.0]) == "\u2581 \u2585\u2588"
    assert lines.sparkline([2.0, 2.0]) == "\u2584\u2584"
    assert lines.sparkline([math.nan, math.inf]) == "  "


def test_changes_are_against_the_first_measurement() -> None:
    first, last = (
        {"pass@1": 0.25, "unscored_fraction": 0.0},
        {"pass@1": 0.5, "unscored_fraction": 0.0, "mean_tokens": 9.0},
    )
    assert lines.changes(first, last) == [("pass@1", "0.500", "+0.250"), ("mean_tokens", "9", "")]
