from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rlflow.recipe import Recipe


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    def make(**blocks: Any) -> Recipe:
        data = {"train": {"generator": "addition", "args": {"api_key": "hunter2-secret"}}}
        least = {
            "algorithm": {"name": "grpo", "group_size": 8},
            "model": {"path": "some/model"},
            "data": data,
            "rewards": [{"name": "math_accuracy"}],
            "run": {"steps": 20},
        }
        return Recipe.model_validate(least | blocks)

    return make
