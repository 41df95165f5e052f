"""The learning rate of an update."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rlflow.driver.schedules import LearningRate
from rlflow.recipe import TrainerBlock


def learning_rates(num_steps: int, updates_per_step: int = 1, critic_steps: int = 0, **trainer: Any) -> list[float]:
    block = TrainerBlock.model_validate({"learning_rate": 8.0, **trainer})
    schedule = LearningRate(block, num_steps, updates_per_step, critic_steps)
    return [schedule.of(step, update) for step in range(num_steps) for update in range(updates_per_step)]


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
    assert learning_rates(3, updates_per_step=2, warmup_steps=2) == pytest.approx([2.0, 4.0, 6.0, 8.0, 8.0, 8.0])


def test_the_policys_schedule_begins_behind_the_critics_steps():
    rates = learning_rates(6, critic_steps=2, schedule="linear")
    assert rates[2:] == pytest.approx(learning_rates(4, schedule="linear"))
