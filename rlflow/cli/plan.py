"""`rlflow plan`: what a recipe will do, before anything starts."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace

from rlflow.cli.common import add_recipe_arguments, parser_of
from rlflow.cli.preflight import check, check_in_use
from rlflow.garbage import without_collection
from rlflow.machine import named_cluster, this_machine
from rlflow.plan_text import render
from rlflow.planning import GIB, make_plans
from rlflow.ray_cluster import require_answer
from rlflow.recipe.loading import load_located

SUMMARY = "say what a recipe will do and need, without starting anything"


def make_parser() -> argparse.ArgumentParser:
    example = "rlflow plan recipes/quickstart.yaml rollout.workers=2"
    parser = parser_of("plan", SUMMARY, example)
    add_recipe_arguments(parser)
    told = "of each GPU that the run will have; found out by itself on a machine with GPUs"
    parser.add_argument("--gpu-memory", type=_positive, metavar="GIB", help=told)
    untold = "do not read the data: it is large, or on a hub; what is wrong with it is then told by the run"
    parser.add_argument("--no-data", action="store_true", help=untold)
    return parser


@without_collection()
def execute(arguments: argparse.Namespace) -> int:
    machine = this_machine()
    if arguments.gpu_memory:
        machine = replace(machine, gpu_memory=int(arguments.gpu_memory * GIB))
    stages = load_located(arguments.recipe, arguments.overrides)
    check(stages)
    readings = check_in_use(stages, read=lambda _: not arguments.no_data)
    counts = [reading.num_rows for reading in readings], [reading.images for reading in readings]
    plans = make_plans([stage.recipe for stage in stages], machine, *counts)
    print("\n\n".join(render(plan) for plan in plans))
    if (address := named_cluster()) is not None:
        require_answer(address)
    return 0


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of GiB")
    return number
