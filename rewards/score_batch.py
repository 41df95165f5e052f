"""What a reward server answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


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
