"""What each tracker's child process is started with: what the run is called, where it writes, which settings it had.

A name is the recipe's (``experiment``), or that of the tracker's own variable, or made from the output directory.
"""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from rlflow.recipe import Recipe
from rlflow.recipe.yaml_source import dump
from rlflow.tracking.redact import redact

PROJECT = "rlflow"


@dataclass(frozen=True, slots=True)
class Names:
    """What a run is called: each is None where the tracker's own variable, or nothing, says it."""

    project: str | None
    name: str | None
    group: str | None


def names_of(recipe: Recipe, directory: Path, environ: Mapping[str, str], variables: Mapping[str, str]) -> Names:
    """
    Args:
        directory: The stage's.
        variables: ``project``, ``name``, ``group`` -> the tracker's own variable, where it has one.
    """
    given, stage = recipe.experiment, recipe.stage
    said = {key: environ.get(variable) or None for key, variable in variables.items()}
    name, group = given.name or said.get("name"), given.group or said.get("group")
    if stage is not None:
        of_run = name or directory.parent.name
        name, group = f"{of_run}/{stage}", group or of_run
    return Names(given.project or said.get("project") or PROJECT, name or directory.name, group)


def arguments_of(tracker: str, recipe: Recipe, directory: Path) -> dict[str, Any]:
    """What the sink of ``tracker`` is made with; its own directory is made."""
    (directory / tracker).mkdir(exist_ok=True)
    return _ARGUMENTS[tracker](recipe, directory, os.environ)


def run_id(path: Path, given: str | None = None) -> str:
    """The id kept at ``path``, made or given the first time."""
    if not path.exists():
        path.write_text(f"{given or secrets.token_hex(4)}\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _config(recipe: Recipe) -> dict[str, Any]:
    return redact(recipe.model_dump(mode="json"))


def _wandb(recipe: Recipe, directory: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    """Of ``wandb.init``, which takes from the environment what is None."""
    variables = {"project": "WANDB_PROJECT", "name": "WANDB_NAME", "group": "WANDB_RUN_GROUP"}
    names, given = names_of(recipe, directory, environ, variables), recipe.experiment
    own_id = environ.get("WANDB_RUN_ID")
    # Each stage is a run of its own.
    stage_id = own_id and recipe.stage and f"{own_id}-{recipe.stage}"
    return {
        "project": names.project,
        "name": names.name,
        "group": names.group,
        "entity": given.entity,
        "tags": given.tags or None,
        "notes": given.notes,
        "dir": str(directory),
        "id": run_id(directory / "wandb" / "run_id", stage_id or own_id),
        "resume": "allow",
        "mode": wandb_mode(environ),
        "config": _config(recipe),
    }


def _tensorboard(recipe: Recipe, directory: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    return {"directory": str(directory / "tensorboard"), "config": dump(_config(recipe))}


def _trackio(recipe: Recipe, directory: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    """Of ``trackio.init``, for which a run is its name: the id makes it this run's alone."""
    names = names_of(recipe, directory, environ, {})
    about = {"tags": recipe.experiment.tags, "notes": recipe.experiment.notes}
    return {
        "project": names.project,
        "name": f"{names.name}-{run_id(directory / 'trackio' / 'run_id')}",
        "group": names.group,
        "resume": "allow",
        "config": _config(recipe) | {key: value for key, value in about.items() if value},
    }


def _swanlab(recipe: Recipe, directory: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    """Of ``swanlab.init``, which takes from the environment what is None."""
    variables = {"project": "SWANLAB_PROJ_NAME", "name": "SWANLAB_EXP_NAME", "group": "SWANLAB_GROUP"}
    names, given = names_of(recipe, directory, environ, variables), recipe.experiment
    return {
        "project": names.project,
        "name": names.name,
        "group": names.group,
        "workspace": given.entity,
        "tags": given.tags or None,
        "description": given.notes,
        "log_dir": str(directory / "swanlab"),
        "id": run_id(directory / "swanlab" / "run_id", environ.get("SWANLAB_RUN_ID")),
        "resume": "allow",
        "mode": environ.get("SWANLAB_MODE") or (None if _has_swanlab_key(environ) else "offline"),
        "config": _config(recipe),
    }


def _has_swanlab_key(environ: Mapping[str, str]) -> bool:
    """Whether ``swanlab login`` was called, or a key is given."""
    home = Path(os.path.expanduser(environ.get("SWANLAB_SAVE_DIR") or "~/.swanlab"))
    return bool(environ.get("SWANLAB_API_KEY")) or (home / ".netrc").is_file()


def wandb_mode(environ: Mapping[str, str]) -> Literal["offline"] | None:
    """``offline`` when neither environment nor netrc holds a key; None leaves the choice to wandb's own settings."""
    if environ.get("WANDB_MODE") or environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return None
    host = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    path = Path(os.path.expanduser(environ.get("NETRC") or "~/.netrc"))
    try:
        return None if netrc.netrc(path).authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


_ARGUMENTS = {"wandb": _wandb, "tensorboard": _tensorboard, "trackio": _trackio, "swanlab": _swanlab}
