"""What of a step that failed is kept, the checkpoint of the step before it and its own rollouts, and which failures a
stage goes on after by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from rlflow.actor_groups import Actors
from rlflow.actors.actor_group import ActorFailure
from rlflow.actors.reference_model import ReferenceModel
from rlflow.actors.trainer import Trainer
from rlflow.driver.book import Book
from rlflow.driver.errors import RunError, StopRequested
from rlflow.driver.window import Window
from rlflow.plugins import PluginError
from rlflow.tracking.rollouts import rollouts_path, write_rollouts

_FAILURES = (RunError, ActorFailure, PluginError)
"""Behind which there is something to save."""

LOOK_FOR_DEAD_S = 10.0
"""When one of several trainers is gone, the others fail or hang, in whatever call they were in."""


class ActorsLost(ActorFailure):
    """An actor whose state the checkpoints hold is gone: the stage can go on from the newest with fresh ones."""


@contextmanager
def finding_the_lost(actors: Actors) -> Iterator[None]:
    """An actor's failure within that came of the death of a trainer, critic, reference or
    teacher is raised as `ActorsLost`."""
    try:
        yield
    except ActorFailure as failure:
        if failure.refused:
            raise
        for group in (actors.trainer, actors.critic):
            if group is not None and (death := group.find_dead(Trainer.attention_cost, LOOK_FOR_DEAD_S)):
                raise ActorsLost(death.actor, failure.call, death.reason, died=True) from failure
        for frozen in (actors.reference, actors.teacher):
            if frozen is not None and (death := frozen.find_dead(ReferenceModel.ready, LOOK_FOR_DEAD_S)):
                raise ActorsLost(death.actor, failure.call, death.reason, died=True) from failure
        raise


@contextmanager
def saving_what_failed(book: Book) -> Iterator[None]:
    """A failure within leaves the checkpoint of the last step, where that can be, and is raised.

    What could not be written to the disk is not written once more.
    """
    try:
        yield
    except StopRequested:
        raise
    except _FAILURES as error:
        if told := save_after_failure(book, error):
            book.tracker.message(told)
        raise


@contextmanager
def keeping_rollouts(book: Book, window: Window) -> Iterator[None]:
    """A step that fails within leaves its rollouts, as far as they have come back, for people to look at."""
    try:
        yield
    except _FAILURES:
        step, groups = window.at_hand
        path = rollouts_path(book.directory, step + 1)
        if book.step == step + 1 and groups and not path.exists():
            unknown = [np.full(len(group.rollouts), np.nan) for group in groups]
            write_rollouts(path, groups, unknown, ["masked" for group in groups for _ in group.rollouts])
            book.tracker.message(f"the rollouts of step {step + 1}, which failed, are in {path}")
        raise


def save_after_failure(book: Book, error: Exception) -> str:
    """Saves the step that ended last, if no checkpoint has it and the trainers still hold it. Returns what was done.

    A step that failed behind its first update has no checkpoint: it would be trained twice in part.
    """
    ended = book.unsaved
    if ended is None:
        return ""
    if book.learner.num_moves != ended.num_moves:
        whole = f"step {ended.step} was the last whole one"
        return f"{whole}; parameters have moved since, so no checkpoint of it was saved"
    if isinstance(error, ActorFailure) and error.actor.partition("[")[0] in ("trainer", "critic"):
        return f"no checkpoint of step {ended.step} was saved: the trainers failed"
    try:
        book.learner.require_answers()
        book.save(ended)
    except (ActorFailure, OSError) as failure:
        return f"no checkpoint of step {ended.step} could be saved: {failure}"
    return f"the checkpoint of step {ended.step} was saved: go on with --resume"
