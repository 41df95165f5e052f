"""What a reward server is given of a group, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rlflow.types import Episode, Prompt


@dataclass(frozen=True, slots=True)
class GroupTexts:
    """What a RewardServer sees of a group."""

    prompt: Prompt
    texts: tuple[str, ...]
    """Of each rollout."""
    completion_ids: tuple[bytes, ...]
    """int32 [C] of each rollout, as bytes: a hundred times cheaper to move than a list."""
    episodes: tuple[Episode, ...] = ()
    """Of each rollout; none where every rollout is one completion."""


@dataclass(frozen=True, slots=True)
class ScoreBatch:
    """What a RewardServer returns for the rollouts of some groups, in their order."""

    rewards: Mapping[str, np.ndarray]
    """Reward function -> float32 [rows]; NaN where it abstained or failed."""
    failed: Mapping[str, np.ndarray]
    """Reward function -> bool [rows]; True where it failed (raised, timed out, returned NaN or nonsense)."""
    causes: Mapping[int, str]
    """Row -> which functions failed on it, and why."""
    errors: tuple[str, ...]
    """One sentence a cause, at most a handful: function, first row, how many more, what happened."""
    seconds: float
