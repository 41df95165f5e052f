"""What a stage decides by itself: the learning rate of an update."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rlflow.driver.stage import Stage
from rlflow.recipe import TrainerBlock


def learning_rates(num_updates: int, updates_per_step: int = 1, **trainer: Any) -> list[float]:
    block = TrainerBlock.model_validate({"learning_rate": 8.0, **trainer})
    stage = cast(Stage, SimpleNamespace(recipe=SimpleNamespace(trainer=block)))
    return [Stage.learning_rate(stage, update, num_updates, updates_per_step) for update in range(num_updates)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [8.0, 8.0, 8.0, 8.0]),
        ("linear", [8.0, 6.0, 4.0, 2.0]),
        ("cosine", [8.0, 4 + 4 * math.sqrt(0.5), 4.0, 4 - 4 * math.sqrt(0.5)]),
    ],
)
def test_a_schedule_goes_from_the_peak_towards_nothing(schedule: str, expected: list[float]):
    assert learning_rates(4, schedule=schedule) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_in_equal_parts_and_the_schedule_begins_behind_it(schedule: str):
    rates = learning_rates(8, schedule=schedule, warmup_steps=4)
    assert rates[:4] == pytest.approx([2.0, 4.0, 6.0, 8.0])
    assert rates[4:] == pytest.approx(learning_rates(4, schedule=schedule))


def test_warm_up_counts_steps_where_a_step_has_several_updates():
    assert learning_rates(6, updates_per_step=2, warmup_steps=2) == pytest.approx([2.0, 4.0, 6.0, 8.0, 8.0, 8.0])
