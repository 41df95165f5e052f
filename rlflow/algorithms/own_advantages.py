"""The user's own advantages: what their function is given, and what it must return. numpy, on the driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlflow.plugins import PluginError, call_by_name
from rlflow.recipe.advantage_blocks import OwnAdvantageBlock


def own_advantages(
    block: OwnAdvantageBlock,
    rewards: np.ndarray,
    group_of: np.ndarray,
    lengths: np.ndarray,
    columns: Sequence[Mapping[str, Any]],
) -> list[np.ndarray]:
    """An advantage for each loss token, float64 [L] a rollout; 0 where unscored.

    Args:
        rewards: float [S], NaN where unscored.
        group_of: int [S], ascending: which prompt each rollout is of.
        lengths: int [S]: L, the loss tokens of each.
        columns: Of each rollout's prompt: the row's other columns.

    Raises:
        PluginError: The function raises, or returns neither a number a rollout nor an array of its length.
    """
    given = call_by_name(block.plugin, block.args, rewards=rewards, group_of=group_of, lengths=lengths, columns=columns)
    if not isinstance(given, np.ndarray | Sequence) or len(given) != len(rewards):
        size = f" of {len(given)}" if isinstance(given, np.ndarray | Sequence) else ""
        raise PluginError(
            f"{block.plugin} returned a {type(given).__name__}{size}: return a number for each of the {len(rewards)} "
            "rollouts, or an array of its tokens"
        )
    return [
        _of_tokens(block.plugin, advantage, int(length), is_scored=not np.isnan(reward))
        for advantage, length, reward in zip(given, lengths, rewards, strict=True)
    ]


def _of_tokens(plugin: str, advantage: object, length: int, *, is_scored: bool) -> np.ndarray:
    values = np.asarray(advantage, dtype=np.float64)
    if values.ndim and values.shape != (length,):
        raise PluginError(f"{plugin} returned {list(values.shape)} advantages for a rollout of {length} tokens")
    if not is_scored:
        return np.zeros(length)
    if not np.isfinite(values).all():
        raise PluginError(f"{plugin} returned an advantage that is not finite, for a rollout that has a reward")
    return np.broadcast_to(values, (length,)).copy()
