"""The run directory: what is put there before the first step, and how an earlier run's is kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlflow.checkpoint import CheckpointError, verify_model
from rlflow.data.errors import DataError
from rlflow.data.new_model import write_new_model
from rlflow.driver.resuming import Inputs, changes_since, models_of, read_recipe, write_recipe
from rlflow.driver.run_lock import LOCK
from rlflow.memory import UnknownShape, read_shape
from rlflow.recipe import AdapterBlock, ModelBlock, Recipe
from rlflow.recipe.adapter_files import same_model
from rlflow.recipe.model_blocks import OF_THE_ADAPTER

_OWN_FILES = {LOCK}
"""What may lie in a directory that counts as empty."""
INITIAL_MODEL = "initial_model"
"""Of a run's directory: what training starts from, where that is on no disk before."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Where a stage writes, and what was there before."""

    path: Path
    is_new: bool
    """Nothing was there."""
    aside: Path | None
    """Where an earlier run's directory was moved to."""
    notes: tuple[str, ...] = ()
    """What people should know of it."""

    def discard(self) -> None:
        """Undoes prepare_directory: a run that cannot start leaves nothing."""
        if self.is_new:
            for entry in _entries(self.path):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if self.aside is not None:
            shutil.rmtree(self.path)
            self.aside.rename(self.path)


def prepare_directory(recipe: Recipe, inputs: Inputs, *, resume: bool) -> RunDirectory:
    """Makes the stage's directory with its resolved recipe. Without ``resume`` an earlier run moves aside, whole.

    A run that is resumed keeps its recipe until the new one has taken up its checkpoint.

    Raises:
        DataError: The directory is no run's, or a run is to be resumed whose checkpoints are not this recipe's.
    """
    path = Path(recipe.run.output_dir)
    if problem := directory_problem(path, resume=resume):
        raise DataError(f"run.output_dir: {problem}")
    notes: list[str] = []
    if resume:
        _require_same_model(recipe.model, path)
        notes += [f"resumed with another recipe: {change}" for change in changes_since(recipe, inputs, path)]
    aside = _move_aside(path) if not resume and _entries(path) else None
    if aside is not None:
        notes.append(f"{path} held an earlier run, which is now {aside}")
    is_new = not _entries(path)
    path.mkdir(parents=True, exist_ok=True)
    if is_new:
        write_recipe(recipe, inputs, path)
    (path / "rollouts").mkdir(exist_ok=True)
    (path / "logs").mkdir(exist_ok=True)
    return RunDirectory(path, is_new, aside, tuple(notes))


def directory_problem(path: Path, *, resume: bool = False) -> str | None:
    """Why a run cannot have this directory, and what to do; None when it can.

    It moves aside what an earlier run left, and nothing else: a folder of the user's own stays as it is.
    """
    remedy = "name a directory that is new, empty, or a run's"
    if path.is_file():
        return f"{path} is a file: {remedy}"
    here = Path.cwd()
    is_run = read_recipe(path) is not None
    if path in (here, *here.parents) and not (resume and is_run):
        return f"{path} is the current directory or one around it: {remedy}"
    if _entries(path) and not is_run:
        names = [entry.name for entry in _entries(path)]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return f"{path} is not empty and no run of rlflow's (it holds {shown}): {remedy}"
    return None


def prepare_model(recipe: Recipe, directory: Path) -> ModelBlock:
    """The recipe's model with a path that exists: a new architecture gets a directory with config and tokenizer, and a
    model with new layers one of its own.

    Raises:
        DataError: The model cannot get new layers.
    """
    model, path = recipe.model, directory / INITIAL_MODEL
    if model.expand is not None:
        _expand(model, path)
        return model.model_copy(update={"path": str(path), "revision": None})
    if model.architecture is None:
        return model
    path.mkdir(exist_ok=True)
    write_new_model(model, path)
    return model.model_copy(update={"path": str(path)})


def _expand(model: ModelBlock, path: Path) -> None:
    from rlflow.actors import expanded_model

    if expanded_model.is_written(path):
        return
    try:
        expanded_model.write_expanded(model, path)
    except ValueError as error:
        raise DataError(str(error)) from error


def verify_models(recipe: Recipe) -> None:
    """Compares every model that the recipe names with its manifest, where it has one, as every ``final/`` has.

    Raises:
        DataError: One is damaged.
    """
    for key, path in models_of(recipe).items():
        try:
            verify_model(Path(path))
        except CheckpointError as error:
            raise DataError(
                f"{key}: {error}. Of a run's own final/: remove it, and the run writes it again with --resume"
            ) from error


def _require_same_model(model: ModelBlock, directory: Path) -> None:
    """As far as configs and names tell: a model that was moved is the same, and one that nobody has may be.

    A whole model's checkpoints replace its weights; an adapter's are of use on the base they were trained on alone.

    Raises:
        DataError: It is another than the one whose checkpoints are in ``directory``.
    """
    written = read_recipe(directory)
    if written is None or not (directory / "checkpoints").exists():
        return
    before = ModelBlock.model_validate(written["model"])
    remedy = "set the model block back, or choose another run.output_dir"
    is_other = (before.adapter is None) != (model.adapter is None) or before.expand != model.expand
    if is_other or _has_other_shape(before, model):
        raise DataError(
            f"{directory} has checkpoints of {_named(before)}, and the recipe trains {_named(model)}: {remedy}"
        )
    if changed := list(_changes_of_adapter(before, model)):
        raise DataError(f"{directory} has checkpoints of an adapter with another {'; '.join(changed)}: {remedy}")


def _has_other_shape(before: ModelBlock, now: ModelBlock) -> bool:
    try:
        return before != now and read_shape(before) != read_shape(now)
    except UnknownShape:
        return False


def _changes_of_adapter(before: ModelBlock, now: ModelBlock) -> Iterator[str]:
    """What checkpoints of an adapter take for granted, where it is no longer so: key, value then, value now."""
    adapters = before.adapter, now.adapter
    if adapters[0] is None or adapters[1] is None:
        return
    then, today = _fixed(adapters[0]), _fixed(adapters[1])
    for key, one, other in (
        ("model.path", before.path, now.path),
        ("model.adapter.path", adapters[0].path, adapters[1].path),
    ):
        if one != other and not (one and other and same_model(one, other)):
            yield f"{key} (was {one}, is {other})"
    is_local = now.path is not None and Path(now.path).is_dir()
    if before.revision != now.revision and not is_local:
        yield f"model.revision (was {before.revision}, is {now.revision})"
    for key, value in then.items():
        if value != today[key]:
            yield f"model.adapter.{key} (was {value}, is {today[key]})"


def _fixed(adapter: AdapterBlock) -> dict[str, Any]:
    """What an adapter keeps for life; where it goes on from another, that has it."""
    values = {key: getattr(adapter, key) for key in OF_THE_ADAPTER}
    targets = values["target_modules"]
    return values | {"target_modules": targets if isinstance(targets, str) else sorted(targets)}


def _named(model: ModelBlock) -> str:
    name = model.path or f"a new {(model.architecture or {})['model_type']}"
    if model.expand is not None:
        return f"{model.expand.new_layers} new layers ({model.expand.num_groups} groups) in {name}"
    return f"{'an adapter of ' if model.adapter is not None else ''}{name}"


def _move_aside(directory: Path) -> Path:
    """Renames it. A lock that this process has on it stays with the name: it is in the new directory from the start."""
    number = 1
    while (aside := directory.with_name(f"{directory.name}.{number}")).exists():
        number += 1
    fresh = directory.with_name(f".{directory.name}.new")
    fresh.mkdir(exist_ok=True)
    directory.rename(aside)
    if (aside / LOCK).exists():
        (aside / LOCK).rename(fresh / LOCK)
    fresh.rename(directory)
    return aside


def _entries(directory: Path) -> list[Path]:
    """What lies in it, but for what this run has put there by itself."""
    if not directory.is_dir():
        return []
    return sorted(entry for entry in directory.iterdir() if entry.name not in _OWN_FILES)
