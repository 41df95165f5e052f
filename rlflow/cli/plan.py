"""`rlflow plan`: what a recipe will do, before anything starts."""

from __future__ import annotations

import argparse

from rlflow.cli.common import add_recipe_arguments, parser_of
from rlflow.cli.preflight import load_checked
from rlflow.plan import make_plans, render

SUMMARY = "say what a recipe will do and need, without starting anything"


def make_parser() -> argparse.ArgumentParser:
    example = "rlflow plan recipes/grpo/gsm8k.yaml rollout.workers=2"
    parser = parser_of("plan", SUMMARY, example)
    add_recipe_arguments(parser)
    return parser


def execute(arguments: argparse.Namespace) -> int:
    plans = make_plans(load_checked(arguments.recipe, arguments.overrides))
    print("\n\n".join(render(plan) for plan in plans))
    return 0
