"""What a reward server is given of a group, and what it answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlflow.types import Episode, Group, Prompt


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

    @classmethod
    def of(cls, group: Group) -> GroupTexts:
        rollouts = group.rollouts
        return cls(
            group.prompt,
            tuple(rollout.text for rollout in rollouts),
            tuple(rollout.completion_ids.tobytes() for rollout in rollouts),
            tuple(rollout.episode for rollout in rollouts if rollout.episode is not None),
        )


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
    """That the call took."""

    def split(self, sizes: Sequence[int]) -> Iterator[ScoreBatch]:
        """The scores of each group, of so many rows; what is said of all of them stays with the first."""
        first = 0
        for size in sizes:
            rows = range(first, first + size)
            yield ScoreBatch(
                {label: values[first : rows.stop] for label, values in self.rewards.items()},
                {label: values[first : rows.stop] for label, values in self.failed.items()},
                {row - first: self.causes[row] for row in rows if row in self.causes},
                self.errors if first == 0 else (),
                self.seconds,
            )
            first = rows.stop
