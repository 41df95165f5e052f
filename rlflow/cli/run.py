"""`rlflow run`: the recipe, from here to its checkpoint."""

from __future__ import annotations

import argparse
import errno
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlflow.checkpoint import CheckpointError, DiskError
from rlflow.cli.common import add_recipe_arguments, parser_of
from rlflow.cli.preflight import load_runnable
from rlflow.data.errors import DataError
from rlflow.driver.clock import process_age_s
from rlflow.driver.errors import RunError, StoppedUnsaved, StopRequested
from rlflow.garbage import without_collection
from rlflow.machine import named_cluster
from rlflow.plugins import PluginError
from rlflow.recipe import Recipe
from rlflow.serving.next_commands import next_lines

SUMMARY = "run a recipe, on this machine or on the Ray cluster it can reach"
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}
"""What a full, read-only or broken disk says."""
_LOADING = {"setup", "load"}
"""Calls in which trainers read a model, an adapter or a checkpoint."""


def make_parser() -> argparse.ArgumentParser:
    example = "rlflow run recipes/grpo_gsm8k_smollm2.yaml trainer.learning_rate=2e-6 run.steps=50"
    parser = parser_of("run", SUMMARY, example)
    add_recipe_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in run.output_dir")
    return parser


def execute(arguments: argparse.Namespace) -> int:
    with without_collection():
        recipes = load_runnable(arguments.recipe, arguments.overrides, alone=named_cluster() is None)
    run(recipes, resume=arguments.resume, seconds_before=process_age_s(), process_ends=True)
    print("\n".join(["", *next_lines(recipes[-1])]))
    return 0


def run(
    recipes: Sequence[Recipe],
    *,
    resume: bool,
    seconds_before: float = 0.0,
    process_ends: bool = False,
    callbacks: Sequence[Any] = (),
) -> None:
    """Runs the stages; a failure that one message explains also says where the logs are.

    Args:
        callbacks: See `rlflow.Callback`; called in every stage, beside the recipes' own.

    Raises:
        DataError: What an actor was to load, a model, an adapter or a checkpoint, does not fit the recipe.
        RunError: Anything else that went wrong.
    """
    with without_collection():
        from rlflow.actors.actor_group import ActorFailure
        from rlflow.driver.run import run_recipes

    try:
        run_recipes(
            recipes, resume=resume, seconds_before=seconds_before, process_ends=process_ends, callbacks=callbacks
        )
    except (StopRequested, StoppedUnsaved):
        raise
    except (RunError, ActorFailure, CheckpointError, PluginError, OSError) as error:
        if isinstance(error, OSError) and not isinstance(error, DiskError) and error.errno not in _DISK_ERRORS:
            raise
        logs = [path for recipe in recipes if (path := Path(recipe.run.output_dir) / "logs").is_dir()]
        is_wrong_input = isinstance(error, ActorFailure) and error.refused and error.call in _LOADING
        kind = DataError if is_wrong_input else type(error) if isinstance(error, RunError) else RunError
        raise kind(
            "\n".join([str(error), *[f"logs: {path} (rlflow logs {shlex.quote(str(path.parent))})" for path in logs]])
        ) from error
