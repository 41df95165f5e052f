"""Whether a run can write what it is to leave."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from rlflow import memory
from rlflow.cli.sequence_checks import resolved
from rlflow.driver.directory import directory_problem
from rlflow.recipe import Recipe

Found = Iterator[tuple[str, str]]
"""(dotted key, what is wrong with its value and what to do)."""
_LEAST_BYTES = 16 << 20
"""Of logs, metrics and a small model."""
_TRAINED_BYTES = 12
"""Of a parameter in a checkpoint: the weight and two moments in float32."""


def in_output(recipe: Recipe) -> Found:
    """Of ``run.output_dir``, or of the nearest directory above it that exists."""
    existing = _existing(recipe)
    if not existing.is_dir():
        yield "run.output_dir", f"{existing} is a file: name a directory"
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield "run.output_dir", f"{existing} is read-only, or not yours to write in: name another directory"
    elif shutil.disk_usage(existing).free < _LEAST_BYTES:
        yield "run.output_dir", f"the disk of {existing} is full: make room, or name a directory on another"
    elif problem := directory_problem(Path(recipe.run.output_dir), resume=True):
        yield "run.output_dir", problem


def in_space(recipe: Recipe, to_come: Mapping[str, Recipe]) -> Found:
    """Of a run on this machine.

    Args:
        to_come: The directory that each earlier stage will write, and the stage.
    """
    existing = _existing(recipe)
    free, needed = shutil.disk_usage(existing).free, _bytes(recipe, to_come)
    if _LEAST_BYTES <= free < needed:
        yield (
            "run.output_dir",
            f"{existing} has {free / 2**30:.2f} GiB left, and a checkpoint and the final model alone take "
            f"{needed / 2**30:.2f} GiB: make room, or name a directory on another disk",
        )


def _existing(recipe: Recipe) -> Path:
    path = Path(recipe.run.output_dir)
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _bytes(recipe: Recipe, to_come: Mapping[str, Recipe]) -> int:
    """Of one checkpoint and ``final/``; of an adapter's, and of models that are not known here, the least there is."""
    if recipe.model.adapter is not None:
        return _LEAST_BYTES
    try:
        shape = memory.with_new_layers(memory.read_shape(resolved(recipe.model, to_come)), recipe.model.expand)
    except memory.UnknownShape:
        return _LEAST_BYTES
    # With new layers, the model that training starts from is written as well.
    models = shape.parameters * memory.DTYPE_BYTES[recipe.model.dtype] * (1 if recipe.model.expand is None else 2)
    return _LEAST_BYTES + (shape.parameters - shape.frozen) * _TRAINED_BYTES + models
