"""The one date that a run's chat templates write, whatever day it is when a part of it is rendered."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path

import yaml

from rlflow.recipe.schema import Recipe


def pin_template_dates(recipes: Sequence[Recipe], *, resume: bool) -> list[Recipe]:
    """The recipes with ``data.template_date`` set: as given, as the run that is resumed has it, or today."""
    today = date.today()
    pinned = []
    for recipe in recipes:
        day = recipe.data.template_date or (_date_in(Path(recipe.run.output_dir)) if resume else None) or today
        data = recipe.data.model_copy(update={"template_date": day})
        pinned.append(recipe.model_copy(update={"data": data}))
    return pinned


def _date_in(directory: Path) -> date | None:
    """What a run's recipe.yaml says."""
    path = directory / "recipe.yaml"
    if not path.is_file():
        return None
    written = yaml.safe_load(path.read_text(encoding="utf-8"))["data"].get("template_date")
    return None if written is None else date.fromisoformat(written)
