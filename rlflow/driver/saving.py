"""When a checkpoint is written, and what it says beside the trainers' state."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlflow.recipe import RunBlock


@dataclass(frozen=True, slots=True)
class EndedStep:
    """A step that ended: what its checkpoint says, beside the trainers' state."""

    step: int
    state: dict[str, Any]
    """What the run goes on from."""
    score: float | None
    """Of the evaluation behind it, where there was one."""
    num_moves: int
    """See Learner.num_moves: with more of them, the trainers no longer hold what this step left."""


class SaveSchedule:
    """Due every so many steps, and so many minutes after the last one."""

    def __init__(self, run: RunBlock, now: Callable[[], float] = time.monotonic) -> None:
        self.run, self._now = run, now
        self._saved_at = now()

    def is_due(self, step: int) -> bool:
        """Whether it is, at the end of this step."""
        every, minutes = self.run.save_every, self.run.save_every_minutes
        by_time = minutes is not None and self._now() - self._saved_at >= 60 * minutes
        return by_time or bool(every and step % every == 0)

    def saved(self) -> None:
        """Counts the minutes from now."""
        self._saved_at = self._now()
