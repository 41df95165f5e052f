"""What became of a step's rollouts: how many were scored, and why others were not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rlflow.driver.errors import RunError
from rlflow.rewards.score_batch import ScoreBatch, ScoringError, told


@dataclass(slots=True)
class RolloutReport:
    rows: int = 0
    failed: int = 0
    scored: int = 0
    """Rows with a reward of any function."""
    score_s: float = 0.0
    """Of the call that took longest."""
    errors: list[ScoringError] = field(default_factory=list)
    without: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Function -> rows on which it abstained, rows on which it failed."""

    def add(self, size: int, scores: ScoreBatch) -> None:
        """Takes the scores of so many rollouts."""
        failed, scored = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
        for label, rewards in scores.rewards.items():
            failed_here = scores.failed[label]
            failed |= failed_here
            scored |= ~np.isnan(rewards)
            abstained, failures = self.without.get(label, (0, 0))
            abstained += int((np.isnan(rewards) & ~failed_here).sum())
            self.without[label] = abstained, failures + int(failed_here.sum())
        self.rows += size
        self.failed += int(failed.sum())
        # Where there are no rewards, nothing is missing.
        self.scored += int((scored & ~failed).sum()) if scores.rewards else size
        self.score_s = max(self.score_s, scores.seconds)
        self.errors += scores.errors

    @property
    def account(self) -> str:
        """How many rollouts a function failed on, and why the first of them."""
        return f"{self.failed} of {self.rows} rollouts could not be scored:{listed(self.errors)}"

    @property
    def silence(self) -> str:
        """Where no rollout has a reward: what each function did instead."""
        parts = []
        for label, (abstained, failed) in self.without.items():
            done = [f"abstained on {abstained}"] if abstained else []
            done += [f"failed on {failed}"] if failed else []
            parts.append(f"{label} {' and '.join(done) or 'scored none that the others did not fail on'}")
        return ", ".join(parts)

    def metrics(self) -> dict[str, float]:
        return {"time/reward_s": self.score_s, "reward/error_fraction": self.failed / max(1, self.rows)}

    def require_few_errors(self, limit: float) -> None:
        """Raises RunError when more than ``limit`` of the rollouts are unscored because a reward function failed."""
        if self.failed > limit * self.rows:
            raise RunError(
                f"{self.failed} of {self.rows} rollouts could not be scored, more than "
                f"reward_server.max_error_fraction = {limit:g}:{listed(self.errors)}"
            )


def listed(errors: Sequence[ScoringError]) -> str:
    """The causes of a step's errors, a line each."""
    return "".join(f"\n  {line}" for line in told(errors))
