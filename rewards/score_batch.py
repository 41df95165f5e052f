"""What a reward server is given of a group, and what it answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

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
class ScoringError:
    """Rows on which a function failed for the same reason."""

    function: str
    prompt: str
    """Id of the first row's."""
    row: int
    """The first, in its call."""
    num_rows: int
    cause: str
    rows: tuple[int, ...] = ()
    """All of them, in its call."""

    def __str__(self) -> str:
        more = f" and {self.num_rows - 1} more" if self.num_rows > 1 else ""
        return f"reward {self.function!r}, prompt {self.prompt!r}, row {self.row}{more}: it {self.cause}."


def merged(errors: Iterable[ScoringError]) -> list[ScoringError]:
    """One for each function and cause, whatever calls they came in; the first prompt stands for all."""
    found: dict[tuple[str, str], ScoringError] = {}
    for error in errors:
        before = found.get(key := (error.function, error.cause))
        found[key] = error if before is None else replace(before, num_rows=before.num_rows + error.num_rows)
    return list(found.values())


def told(errors: Iterable[ScoringError], most: int = 3) -> list[str]:
    """The causes as lines, those of most rows first, and how many others there are."""
    causes = sorted(merged(errors), key=lambda error: -error.num_rows)
    lines = [str(error) for error in causes[:most]]
    if left := len(causes) - len(lines):
        lines.append(f"and {left} other cause{'s' if left > 1 else ''}")
    return lines


@dataclass(frozen=True, slots=True)
class ScoreBatch:
    """What a RewardServer returns for the rollouts of some groups, in their order."""

    rewards: Mapping[str, np.ndarray]
    """Reward function -> float32 [rows]; NaN where it abstained or failed."""
    failed: Mapping[str, np.ndarray]
    """Reward function -> bool [rows]; True where it failed (raised, timed out, returned NaN or nonsense)."""
    causes: Mapping[int, str]
    """Row -> which functions failed on it, and why."""
    errors: tuple[ScoringError, ...]
    """One a cause, at most a handful."""
    seconds: float
    """That the call took."""

    def split(self, groups: Sequence[Group]) -> Iterator[ScoreBatch]:
        """The scores of each group. They may be of other steps, or of an evaluation: each has its own errors."""
        first = 0
        for group in groups:
            rows = range(first, first + len(group.rollouts))
            yield ScoreBatch(
                {label: values[first : rows.stop] for label, values in self.rewards.items()},
                {label: values[first : rows.stop] for label, values in self.failed.items()},
                {row - first: self.causes[row] for row in rows if row in self.causes},
                tuple(_within(error, rows, group.prompt.id) for error in self.errors if set(rows) & set(error.rows)),
                self.seconds,
            )
            first = rows.stop


def _within(error: ScoringError, rows: range, prompt: str) -> ScoringError:
    """An error as it befell the rows of one group."""
    own = tuple(row - rows.start for row in error.rows if row in rows)
    return replace(error, prompt=prompt, row=own[0], num_rows=len(own), rows=own)
