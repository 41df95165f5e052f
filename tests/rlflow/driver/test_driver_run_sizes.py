"""How many steps a run takes, and how long a sequence may become."""

from __future__ import annotations

import pytest

from rlflow.driver.material import max_model_len, num_steps
from rlflow.positions import longest_sequences
from rlflow.recipe import Recipe


def recipe_of(**blocks: dict) -> Recipe:
    data = {"train": {"path": "rows.jsonl"}, "prompts_per_step": 4, "max_prompt_tokens": 10}
    model = {"path": "org/model"}
    return Recipe.model_validate(
        {
            "algorithm": {"name": "grpo", "group_size": 2},
            "rewards": [{"name": "exact_match"}],
            "data": data,
            "model": model,
            **blocks,
        }
    )


@pytest.mark.parametrize(
    ("run", "num_rows", "steps"),
    [
        ({"steps": 7}, 100, 7),
        ({"epochs": 1}, 1, 1),
        ({"epochs": 1}, 8, 2),
        ({"epochs": 1}, 9, 3),
        ({"epochs": 2.5}, 8, 5),
        ({"epochs": 0.01}, 8, 1),
    ],
)
def test_epochs_are_as_many_steps_as_their_rows_fill(run: dict, num_rows: int, steps: int):
    assert num_steps(recipe_of(run=run), num_rows) == steps


@pytest.mark.parametrize(("trained", "evaluated", "longest"), [(6, None, 16), (6, 20, 30), (20, 6, 30)])
def test_an_engine_has_room_for_the_longest_completion_of_training_and_evaluation(trained, evaluated, longest):
    evaluation = {"evaluation": {"data": {"path": "rows.jsonl"}, "max_new_tokens": evaluated}}
    recipe = recipe_of(rollout={"max_new_tokens": trained}, run={"steps": 1}, **(evaluation if evaluated else {}))
    assert max_model_len(recipe) == longest
    sets = [{"name": name, **evaluation["evaluation"]} for name in "ab"]
    sets[0]["max_new_tokens"] = 1
    recipe = recipe_of(rollout={"max_new_tokens": trained}, run={"steps": 1}, evaluation=sets)
    assert max_model_len(recipe) == longest
    assert max(longest_sequences(recipe).values()) == longest
