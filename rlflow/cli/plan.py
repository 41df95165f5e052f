"""`rlflow plan`: what a recipe will do, before anything starts."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace

from rlflow.cli.common import add_recipe_arguments, parser_of
from rlflow.cli.preflight import check, check_in_use
from rlflow.garbage import without_collection
from rlflow.machine import Machine, named_cluster, this_machine
from rlflow.plan_text import render
from rlflow.planning import GIB, Plan, make_plans
from rlflow.ray_cluster import require_answer
from rlflow.recipe.loading import LocatedRecipe, load_located

SUMMARY = "say what a recipe will do and need, without starting anything"


def make_parser() -> argparse.ArgumentParser:
    example = "rlflow plan recipes/quickstart.yaml rollout.workers=2"
    parser = parser_of("plan", SUMMARY, example)
    add_recipe_arguments(parser)
    told = "of each GPU that the run will have; found out by itself on a machine with GPUs"
    parser.add_argument("--gpu-memory", type=_positive, metavar="GIB", help=told)
    tokenized = "render and tokenise every row, as a run does before it starts: which of them fit"
    parser.add_argument("--tokenize", action="store_true", help=tokenized)
    untold = "do not read the data: it is large, or on a hub; what is wrong with it is then told by the run"
    parser.add_argument("--no-data", action="store_true", help=untold)
    return parser


@without_collection()
def execute(arguments: argparse.Namespace) -> int:
    machine = this_machine()
    if arguments.gpu_memory:
        machine = replace(machine, gpu_memory=int(arguments.gpu_memory * GIB))
    stages = load_located(arguments.recipe, arguments.overrides)
    plans = plans_of(stages, machine, read_data=not arguments.no_data, tokenize=arguments.tokenize)
    print("\n\n".join(render(plan) for plan in plans))
    if (address := named_cluster()) is not None:
        require_answer(address)
    return 0


def plans_of(
    stages: Sequence[LocatedRecipe], machine: Machine, *, read_data: bool = True, tokenize: bool = False
) -> list[Plan]:
    """What each stage will do, where nothing is wrong with it.

    Raises:
        RecipeError: All that is wrong.
    """
    check(stages)
    readings = check_in_use(stages, read=lambda _: read_data, tokenize=tokenize)
    return make_plans(
        [stage.recipe for stage in stages],
        machine,
        [reading.num_rows for reading in readings],
        [reading.images for reading in readings],
        [reading.tokenized for reading in readings],
    )


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of GiB")
    return number
