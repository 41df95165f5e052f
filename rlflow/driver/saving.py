"""When a checkpoint is written, and what of a step that failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlflow.actors.actor_group import ActorFailure
from rlflow.actors.trainer import Trainer
from rlflow.driver.errors import RunError, StopRequested
from rlflow.recipe import RunBlock
from rlflow.tracking.rollouts import write_rollouts

if TYPE_CHECKING:
    from pathlib import Path

    from rlflow.driver.rollouts import RolloutPipeline
    from rlflow.driver.stage import Stage

_ANSWER_S = 30.0
"""A trainer that says nothing for so long is not asked for a checkpoint."""


@dataclass(frozen=True, slots=True)
class EndedStep:
    """What a checkpoint of a step says, beside the trainers' state."""

    step: int
    state: dict[str, Any]
    """What the loop goes on from."""
    score: float | None
    """Of the evaluation behind it, where there was one."""


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


def save_trainers(stage: Stage, directory: Path) -> None:
    """Writes every rank's state into a directory that exists."""
    stage.actors.trainer.call_all(Trainer.save, directory)
    if stage.actors.critic is not None:
        (directory / "critic").mkdir()
        stage.actors.critic.call_all(Trainer.save, directory / "critic")


@contextmanager
def saving_what_failed(stage: Stage) -> Iterator[None]:
    """A failure within leaves the checkpoint of the last step, where that can be, and is raised.

    What could not be written to the disk is not written once more.
    """
    try:
        yield
    except StopRequested:
        raise
    except (RunError, ActorFailure) as error:
        if told := save_after_failure(stage, error):
            stage.tracker.message(told)
        raise


@contextmanager
def keeping_rollouts(stage: Stage, pipeline: RolloutPipeline) -> Iterator[None]:
    """A step that fails within leaves its rollouts, as far as they have come back, for people to look at."""
    try:
        yield
    except (RunError, ActorFailure):
        step, groups = pipeline.at_hand
        path = rollouts_path(stage.directory, step + 1)
        if stage.step == step + 1 and groups and not path.exists():
            unknown = [np.full(len(group.rollouts), np.nan) for group in groups]
            write_rollouts(path, groups, unknown, ["masked" for group in groups for _ in group.rollouts])
            stage.tracker.message(f"the rollouts of step {step + 1}, which failed, are in {path}")
        raise


def rollouts_path(directory: Path, step: int) -> Path:
    """Where a run keeps what was generated for a step, counted from 1."""
    return directory / "rollouts" / f"step_{step:06d}.parquet"


def save_after_failure(stage: Stage, error: Exception) -> str:
    """Saves the step that ended last, if no checkpoint has it and the trainers still hold it. Returns what was done.

    A step that failed behind its first update has no checkpoint: it would be trained twice in part.
    """
    if stage.unsaved is None:
        return ""
    step = stage.unsaved.step
    if stage.has_moved:
        return f"step {step} was the last whole one; parameters have moved since, so no checkpoint of it was saved"
    if isinstance(error, ActorFailure) and error.actor.partition("[")[0] in ("trainer", "critic"):
        return f"no checkpoint of step {step} was saved: the trainers failed"
    groups = [stage.actors.trainer, *([stage.actors.critic] if stage.actors.critic is not None else [])]
    try:
        for group in groups:
            group.start_all(Trainer.attention_cost).get(_ANSWER_S)
        stage.save(stage.unsaved)
    except (ActorFailure, OSError) as failure:
        return f"no checkpoint of step {step} could be saved: {failure}"
    return f"the checkpoint of step {step} was saved: go on with --resume"
