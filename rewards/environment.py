"""What an episode's environment gave: the sum of its steps' rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def environment(
    prompts: Sequence[Any],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    environment_reward: Sequence[float],
    **columns: Any,
) -> list[float]:
    """
    Args:
        environment_reward: Of each rollout.
    """
    return list(environment_reward)
