"""What a user's own code may hear of a run, and how it ends one. Nothing is imported here: `import rlflow` has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rlflow.recipe import Recipe

Answer = Literal["stop"] | None
"""``stop`` ends the stage, with a checkpoint and ``final/``."""
Outcome = Literal["finished", "stopped", "failed"]


class StopTraining(Exception):
    """Raised by a callback, says what ``stop`` says as an answer."""


class Callback:
    """Hears what a run does, in the driver; the run waits for each call. A callback overrides what it cares about.

    Calls come in the order of their names here. What a callback raises ends the run, with a checkpoint, in an error
    that names it.
    """

    def on_run_start(self, recipe: Recipe) -> None:
        """A stage is about to begin. ``recipe.stage`` is its name, ``recipe.run.output_dir`` its place."""

    def on_step(self, step: int, metrics: Mapping[str, float]) -> Answer:
        """A step, counted from 1, is done and logged."""

    def on_evaluation(self, step: int, name: str, metrics: Mapping[str, float]) -> Answer:
        """The policy after ``step`` was measured on held-out rows; 0 is before the first.

        Args:
            name: Of the evaluation.
            metrics: Without ``eval/<name>/`` before their names.
        """

    def on_checkpoint(self, step: int, path: Path) -> Answer:
        """A checkpoint is written. Asked to stop here, the run ends behind the next step."""

    def on_run_end(self, recipe: Recipe, outcome: Outcome) -> None:
        """The stage is over: ``finished``, with its ``final/``; ``stopped`` on request; or ``failed``."""
