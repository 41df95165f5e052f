"""A group on its way: asked for, generated, scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from rlflow.rewards.score_batch import GroupTexts
from rlflow.types import GroupRequest, Prompt, RolloutBatch


@dataclass(frozen=True, slots=True)
class Job:
    """A group that is asked for."""

    request: GroupRequest
    prompt: Prompt
    epoch: int
    labels: tuple[str, ...]
    """Of the reward functions that score it."""
    deliver: Callable[[ScoredGroup], None]
    """Called when it is scored, with the pool's lock held."""
    priority: tuple[int, ...] = ()
    """Lower comes first where there is no room for all."""
    is_pinned: bool = False
    """It belongs to one worker, and is asked for again together with all that was asked of it then: so the same
    completions are batched with each other, and have the same bits."""

    @property
    def num_sequences(self) -> int:
        return len(self.request.seeds)


@dataclass(frozen=True, slots=True)
class Generated:
    """A group as a worker gave it back."""

    job: Job
    batch: RolloutBatch
    index: int
    """Which of the batch's groups it is."""

    @property
    def rows(self) -> range:
        first = self.batch.first_rows
        return range(int(first[self.index]), int(first[self.index + 1]))

    @property
    def tokens(self) -> slice:
        """Where its tokens are in the batch."""
        rows = self.rows
        return slice(int(self.batch.offsets[rows.start]), int(self.batch.offsets[rows.stop]))

    @property
    def num_sampled_tokens(self) -> int:
        return int(self.batch.is_sampled[self.tokens].sum())

    @property
    def oldest_version(self) -> int:
        """Of the weights that sampled any of its tokens."""
        return int(self.batch.versions[self.tokens][self.batch.is_sampled[self.tokens]].min())

    def texts(self) -> GroupTexts:
        """What a reward server is given of it."""
        batch = self.batch
        spans = [slice(batch.offsets[row], batch.offsets[row + 1]) for row in self.rows]
        return GroupTexts(
            self.job.prompt,
            tuple(batch.texts[row] for row in self.rows),
            tuple(batch.token_ids[span][batch.is_sampled[span]].tobytes() for span in spans),
            tuple(batch.episodes[row] for row in self.rows) if batch.episodes else (),
        )


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group, generated and scored; [G] its rollouts."""

    generated: Generated
    rewards: Mapping[str, np.ndarray]
    """Reward function -> float32 [G]; NaN where it abstained or failed."""
    failed: Mapping[str, np.ndarray]
    """Reward function -> bool [G]."""
    causes: tuple[str, ...]
    """Of each rollout: which functions failed on it, and why; empty where none did."""
    errors: tuple[str, ...]
    """One sentence a cause, of the call that scored it."""
    score_s: float
    """That this call took."""

    @property
    def job(self) -> Job:
        return self.generated.job
