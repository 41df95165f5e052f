"""`rlflow algorithms`: the table, or one row of it with every option."""

from __future__ import annotations

import argparse
import textwrap

from rlflow.cli.common import parser_of
from rlflow.plan import settings
from rlflow.recipe import ALGORITHMS, AlgorithmBlock, Problem, RecipeError
from rlflow.recipe.problems import did_you_mean
from rlflow.recipe.reference import options
from rlflow.recipe.yaml_source import dump, merge

SUMMARY = "list the algorithms, or one with all its options"


def make_parser() -> argparse.ArgumentParser:
    example = "rlflow algorithms grpo"
    parser = parser_of("algorithms", SUMMARY, example)
    parser.add_argument("name", metavar="NAME", nargs="?", help="an algorithm; all of them when left out")
    return parser


def execute(arguments: argparse.Namespace) -> int:
    print(table() if arguments.name is None else row(arguments.name))
    return 0


def table() -> str:
    """A line for every algorithm."""
    width = max(map(len, ALGORITHMS))
    return "\n".join(
        f"{name:<{width}}  {row.family:<10}  {row.summary} ({row.source})" for name, row in ALGORITHMS.items()
    )


def row(name: str) -> str:
    """Every option of one algorithm with its value and meaning; ``*`` marks what the row sets.

    Raises:
        RecipeError: There is no such algorithm.
    """
    if name not in ALGORITHMS:
        raise RecipeError([Problem(name, None, "", f"is no algorithm ({did_you_mean(name, list(ALGORITHMS))})")])
    found = ALGORITHMS[name]
    block = AlgorithmBlock.model_validate(merge(found.defaults, {"name": name}))
    own = {setting.key for setting in settings(block)}
    lines = [f"{name}: {found.summary} ({found.source})", f"family: {found.family}", ""]
    for option in options(block):
        if option.key == "name":
            continue
        value = dump({"v": option.value}).removeprefix("v: ").strip()
        lines.append(f"{'*' if option.key in own else ' '} {option.key}: {value}")
        lines += textwrap.wrap(option.doc, width=100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join([*lines, "", "* set by this algorithm; every option is a key of the recipe's algorithm block"])
