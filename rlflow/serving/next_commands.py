"""What somebody does with a run that has finished: commands as they must be typed."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from rlflow.recipe import Recipe
from rlflow.recipe.sample_blocks import ROWS_FILE


def next_commands(recipe: Recipe) -> list[tuple[str, str]]:
    """Commands on the model of a stage, and what each is for: chat, serve and export; of a reward model, which writes
    no answers, export alone."""
    run = _from_here(Path(recipe.run.output_dir))
    name = f"{run.parent.name}-{run.name}" if recipe.stage is not None and run.parent.name else run.name
    merge = ["--merge"] if recipe.model.adapter is not None else []
    export = ["export", str(run), f"models/{name}", *merge]
    is_policy = recipe.algorithm.learning.head == "token"
    commands = [(["infer", str(run)], "chat"), (["serve", str(run)], "serve")] if is_policy else []
    return [(shlex.join([*program(), *words]), purpose) for words, purpose in [*commands, (export, "export")]]


def _from_here(path: Path) -> Path:
    """Below the working directory as seen from there."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_absolute() and path.is_relative_to(here) and path != here else path


def program() -> list[str]:
    """How this command was called, as far as it can be typed again."""
    called = Path(sys.argv[0])
    if called.name == "rlflow":
        found = shutil.which("rlflow")
        is_on_path = found is not None and Path(found).resolve() == called.resolve()
        return ["rlflow"] if is_on_path or not called.is_file() else [str(called)]
    return [
        Path(sys.executable).name if shutil.which(Path(sys.executable).name) == sys.executable else sys.executable,
        "-m",
        "rlflow",
    ]


def next_lines(recipe: Recipe) -> list[str]:
    """For the end of a run's output."""
    if not recipe.trains:
        return ["next:", f"  train on  {_from_here(Path(recipe.run.output_dir)) / ROWS_FILE}"]
    commands = next_commands(recipe)
    width = max(len(purpose) for _, purpose in commands)
    return ["next:", *(f"  {purpose:<{width}}  {command}" for command, purpose in commands)]
