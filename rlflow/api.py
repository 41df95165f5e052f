"""The verbs of the command line for programs: see `rlflow`, which has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlflow.cli.plan import plans_of
from rlflow.cli.preflight import load_runnable
from rlflow.cli.run import run as run_stages
from rlflow.machine import named_cluster, this_machine
from rlflow.planning import Plan
from rlflow.recipe.loading import RecipeSource, load_located
from rlflow.results import Result, result_of


def run(
    recipe: RecipeSource,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    resume: bool = False,
    callbacks: Sequence[Any] = (),
) -> Result:
    """Runs a recipe, as ``rlflow run`` does, and waits for its end.

    Ctrl-C, and a notebook's interrupt, end it behind the step that is under way, with a checkpoint.

    Args:
        recipe: A YAML file, a mapping of what such a file would say, or recipes from `load_recipe`.
        overrides: Dotted keys to values, ``{"trainer.learning_rate": 2e-6}``; or ``"key=value"`` each.
        resume: Go on from the newest checkpoint in ``run.output_dir``.
        callbacks: Objects with some of `Callback`'s methods, or functions of (step, metrics), called in every stage
            beside the recipe's own.

    Raises:
        RecipeError, DataError: The recipe or the data is wrong; nothing was started.
        TypeError: A callback is none.
        StopRequested: Somebody asked the run to stop; it can be resumed.
        RunError: The run failed, in a callback (`CallbackError`) or elsewhere.
    """
    recipes = load_runnable(recipe, overrides, alone=named_cluster() is None)
    run_stages(recipes, resume=resume, callbacks=callbacks)
    directories = [Path(stage.run.output_dir) for stage in recipes]
    is_one = len(recipes) == 1 and recipes[0].stage is None
    return result_of(directories[0] if is_one else directories[0].parent, directories)


def plan(
    recipe: RecipeSource,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    read_data: bool = True,
    tokenize: bool = False,
) -> list[Plan]:
    """What each stage will do and need, without starting anything: ``print(*rlflow.plan("recipe.yaml"))``.

    Args:
        recipe: As for `run`.
        overrides: As for `run`.
        read_data: Whether the data is read; it may be large.
        tokenize: Whether every row is rendered and tokenised as well, as a run does it before it starts.

    Raises:
        RecipeError, DataError: The recipe or the data is wrong.
    """
    return plans_of(load_located(recipe, overrides), this_machine(), read_data=read_data, tokenize=tokenize)
