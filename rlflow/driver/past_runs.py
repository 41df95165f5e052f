"""Runs that are over, or under way elsewhere, read back: their stages, recipes, and what they were trained from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlflow.data.errors import DataError
from rlflow.driver.resuming import RECIPE, read_recipe
from rlflow.recipe import ALGORITHMS, ModelBlock, Recipe
from rlflow.recipe.local_paths import is_hub_id

CHECKPOINTS, FINAL = "checkpoints", "final"
"""In a stage's directory."""
_ASIDE = re.compile(r"\.\d+$")


def stages_of(path: Path) -> Iterator[Path]:
    """The stages in a run's directory, in the order in which they began; of a run without stages, itself.

    Those that moved aside for another of their name, such as grpo.1, are not among them.
    """
    found = [recipe.parent for recipe in (path / RECIPE, *path.glob(f"*/{RECIPE}")) if recipe.is_file()]
    own = [one for one in found if any((one / name).exists() for name in ("inputs.json", CHECKPOINTS, FINAL))]
    names = {one.name for one in own}
    kept = [one for one in own if not (_ASIDE.search(one.name) and _ASIDE.sub("", one.name) in names)]
    yield from sorted(kept, key=_began)


def leaves_rows(stage: Path) -> bool:
    """Whether a stage is one that samples: it leaves no model."""
    stored = read_recipe(stage)
    name = None if stored is None else stored["algorithm"].get("name")
    return name in ALGORITHMS and ALGORITHMS[name].objective == "none"


def _began(stage: Path) -> float:
    """When its first step was logged; without a log, when its recipe was written."""
    try:
        with (stage / "metrics.jsonl").open(encoding="utf-8") as file:
            return float(json.loads(file.readline())["time"])
    except (OSError, ValueError, LookupError, TypeError):
        return (stage / RECIPE).stat().st_mtime


def read_run(run: Path) -> Recipe:
    """The resolved recipe of a stage.

    Raises:
        DataError: It is of another version of rlflow, or damaged: in what, and no more.
    """
    stored = read_recipe(run)
    if stored is None:
        cause = "it cannot be read, or lacks blocks that every resolved recipe has"
        raise DataError(f"{run / RECIPE} is of another version of rlflow, or damaged ({cause})")
    try:
        return Recipe.model_validate(stored)
    except ValidationError as error:
        first = error.errors()[0]
        said = "a key that this version does not read" if first["type"] == "extra_forbidden" else first["msg"]
        cause = f"{'.'.join(map(str, first['loc']))}: {said}"
        raise DataError(f"{run / RECIPE} is of another version of rlflow ({cause})") from error


def other_versions(runs: Iterable[Path]) -> Iterator[str]:
    """One line about each stage of ``runs`` whose recipe is of another version of rlflow, or damaged."""
    for stage in dict.fromkeys(stage for run in runs for stage in stages_of(run)):
        try:
            read_run(stage)
        except DataError as error:
            yield f"{stage} is used without its run's settings: {error}"


def name_of(run: Path, recipe: Recipe) -> str:
    """The run's, and the stage's where it has several."""
    return f"{run.absolute().parent.name}-{run.name}" if recipe.stage else run.absolute().name


def model_of(recipe: Recipe, run: Path) -> ModelBlock:
    """The recipe's model block with paths that exist: what a run started from may have moved with it.

    Raises:
        DataError: It is gone.
    """
    model, changes = recipe.model, dict[str, Any]()
    if model.architecture is not None or model.expand is not None:
        changes["path"] = str(run / "initial_model")
    elif model.path is not None:
        changes["path"] = find_directory(model.path, run) or model.path
    if model.adapter is not None and model.adapter.prepared_start is not None:
        changes["adapter"] = model.adapter.model_copy(update={"path": str(run / "initial_adapter")})
    elif model.adapter is not None and model.adapter.path is not None:
        path = find_directory(model.adapter.path, run) or model.adapter.path
        changes["adapter"] = model.adapter.model_copy(update={"path": path})
    model = model.model_copy(update=changes)
    for path in (model.path, model.adapter and model.adapter.path):
        if path is not None and not Path(path).is_dir() and not is_hub_id(path):
            raise DataError(
                f"{run} was trained from {path}, which is not there, and whose config and tokenizer are needed: put it "
                "back, a link will do"
            )
    return model


def find_directory(path: str, run: Path) -> str | None:
    """Where a directory is that a run names: there, or beside the run, which was moved together with it."""
    parts = Path(path).parts
    beside = [run.absolute().parents[depth - 2].joinpath(*parts[-depth:]) for depth in (2, 3) if len(parts) >= depth]
    return next((str(one) for one in (Path(path), *beside) if one.is_dir()), None)
