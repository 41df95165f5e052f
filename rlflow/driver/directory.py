"""The run directory: what is put there before the first step, and how an earlier run's is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlflow.data.errors import DataError
from rlflow.data.tokenizer import build_character_tokenizer
from rlflow.memory import UnknownShape, read_shape
from rlflow.recipe import AdapterBlock, ModelBlock, Recipe
from rlflow.recipe.adapter_files import CONFIG, same_model
from rlflow.recipe.model_blocks import OF_THE_ADAPTER
from rlflow.recipe.yaml_source import dump
from rlflow.tracking.redact import redact


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Where a stage writes, and what was there before."""

    path: Path
    is_new: bool
    aside: Path | None
    """Where an earlier run's directory was moved to."""

    def discard(self) -> None:
        """Undoes prepare_directory: a run that cannot start leaves nothing."""
        if self.is_new:
            shutil.rmtree(self.path)
        if self.aside is not None:
            self.aside.rename(self.path)


def prepare_directory(recipe: Recipe, *, resume: bool) -> RunDirectory:
    """Makes the stage's directory with its resolved recipe. Without ``resume`` an earlier run moves aside, whole.

    A run that is resumed keeps its recipe until the new one has taken up its checkpoint.

    Raises:
        DataError: A run is to be resumed whose checkpoints are of another model.
    """
    path = Path(recipe.run.output_dir)
    if resume:
        _require_same_model(recipe.model, path)
    aside = _move_aside(path) if path.exists() and not resume else None
    directory = RunDirectory(path, is_new=not path.exists(), aside=aside)
    (path / "rollouts").mkdir(parents=True, exist_ok=True)
    (path / "logs").mkdir(exist_ok=True)
    if directory.is_new:
        write_recipe(recipe, path)
    return directory


def write_recipe(recipe: Recipe, directory: Path) -> None:
    """The resolved recipe beside what it made, without its secrets: who resumes the run gives them again."""
    (directory / "recipe.yaml").write_text(dump(redact(recipe.model_dump(mode="json"))))


def finished(recipe: Recipe) -> bool:
    """Whether the stage has left its final model or adapter."""
    written = "config.json" if recipe.model.adapter is None else CONFIG
    return (Path(recipe.run.output_dir) / "final" / written).exists()


def prepare_model(recipe: Recipe, directory: Path) -> ModelBlock:
    """The recipe's model with a path that exists: a new architecture gets a directory with config and tokenizer."""
    model = recipe.model
    if model.architecture is None:
        return model
    assert model.characters is not None
    path = directory / "initial_model"
    path.mkdir(exist_ok=True)
    tokenizer = build_character_tokenizer(model.characters)
    tokenizer.save_pretrained(path)
    config = {
        "tie_word_embeddings": True,
        **model.architecture,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": model.dtype,
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return model.model_copy(update={"path": str(path)})


def _require_same_model(model: ModelBlock, directory: Path) -> None:
    """As far as configs and names tell: a model that was moved is the same, and one that nobody has may be.

    A whole model's checkpoints replace its weights; an adapter's are of use on the base they were trained on alone.

    Raises:
        DataError: It is another than the one whose checkpoints are in ``directory``.
    """
    written = directory / "recipe.yaml"
    if not (written.exists() and (directory / "checkpoints").exists()):
        return
    before = ModelBlock.model_validate(yaml.safe_load(written.read_text())["model"])
    remedy = "set the model block back, or choose another run.output_dir"
    if (before.adapter is None) != (model.adapter is None) or _has_other_shape(before, model):
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
    return f"{'an adapter of ' if model.adapter is not None else ''}{name}"


def _move_aside(directory: Path) -> Path:
    number = 1
    while (aside := directory.with_name(f"{directory.name}.{number}")).exists():
        number += 1
    return directory.rename(aside)
