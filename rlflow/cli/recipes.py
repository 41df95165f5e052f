"""`rlflow recipes`: those that come with rlflow, or the text of one, to begin with."""

from __future__ import annotations

import argparse
import re
import textwrap
from pathlib import Path

from rlflow.cli.common import parser_of
from rlflow.recipe import Problem, RecipeError
from rlflow.recipe.packaged import packaged_recipes
from rlflow.recipe.problems import did_you_mean

SUMMARY = "list the recipes that come with rlflow, or print one"


def make_parser() -> argparse.ArgumentParser:
    parser = parser_of("recipes", SUMMARY, "rlflow recipes quickstart > mine.yaml\n  rlflow run quickstart")
    parser.add_argument("name", metavar="NAME", nargs="?", help="a recipe; all of them when left out")
    return parser


def execute(arguments: argparse.Namespace) -> int:
    recipes, name = packaged_recipes(), arguments.name
    if name is None:
        width = max(map(len, recipes))
        for each, path in recipes.items():
            lines = textwrap.wrap(f"{each:<{width}}  {purpose_of(path)}", 120, subsequent_indent=" " * (width + 2))
            print("\n".join(lines))
        return 0
    path = recipes.get(name.removesuffix(".yaml"))
    if path is None:
        raise RecipeError([Problem(name, None, "", f"is no recipe of rlflow's ({did_you_mean(name, list(recipes))})")])
    print(path.read_text(encoding="utf-8"), end="")
    return 0


def purpose_of(path: Path) -> str:
    """The first sentence of the comment at a recipe's head."""
    head = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line.lstrip("# "))
    # A sentence ends behind a word, not behind a title.
    return re.split(r"(?<=\w\w\w)\. ", " ".join(head))[0].rstrip(".")
