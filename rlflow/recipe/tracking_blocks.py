"""Who is told of a run, and what they call it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from rlflow.recipe.block import Block, Conflict

TrackerName = Literal["console", "jsonl", "wandb", "tensorboard", "trackio", "swanlab"]


class ExperimentBlock(Block):
    project: str | None = None
    """What the run is one of many of; rlflow when neither this nor the tracker's own variable is given."""
    name: str | None = None
    """Of this run; the output directory's name when absent. A stage's name is added to it."""
    group: str | None = None
    """Runs that are shown together; the stages of a run are, by its name, when absent."""
    tags: list[str] = Field(default_factory=list)
    """Words to find it by."""
    notes: str | None = None
    """What it is for."""
    entity: str | None = None
    """Whose it is: a team or user of wandb's, a workspace of SwanLab's; the account's own when absent."""

    def conflicts(self) -> Iterator[Conflict]:
        for key in ("project", "name", "group", "entity"):
            value = getattr(self, key)
            if value is not None and not value.strip():
                yield Conflict((key,), "is empty: give one, or remove the line")
