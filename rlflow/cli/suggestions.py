"""What may follow on a command line that is being written."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlflow.cli import main
from rlflow.recipe import ALGORITHMS
from rlflow.recipe.block import Block, blocks_in
from rlflow.recipe.explain import blocks_at
from rlflow.recipe.packaged import packaged_recipes
from rlflow.recipe.problems import RecipeError
from rlflow.recipe.yaml_source import read_document

WORDS = "RLFLOW_WORDS"
"""The variable in which a shell gives the words behind `rlflow`, the one under the cursor last."""
SEPARATOR = "\x1f"
"""Stands behind each of them."""


def suggest(words: Sequence[str]) -> list[str]:
    """What the last word may be completed to; nothing where it is a file's name, which the shell completes.

    Args:
        words: Behind `rlflow`; the last is empty where none was begun.
    """
    if not words:
        return []
    *before, current = words
    candidates = list(_candidates(before, current))
    return [candidate for candidate in dict.fromkeys(candidates) if candidate.startswith(current)]


def _candidates(before: Sequence[str], current: str) -> Iterator[str]:
    if not before:
        yield from main.COMMANDS
        yield from ("--help", "--version")
        return
    name, *rest = before
    if name not in main.COMMANDS:
        return
    actions = main.load_command(name).make_parser()._actions
    options = {option: action for action in actions for option in action.option_strings}
    if rest and (action := options.get(rest[-1])) is not None and action.nargs != 0:
        yield from map(str, action.choices or ())
        return
    if current.startswith("-"):
        yield from options
        return
    positional = [action for action in actions if not action.option_strings]
    given = len(_positional(rest, options))
    if not positional:
        return
    action = positional[min(given, len(positional) - 1)]
    if action.dest == "overrides":
        yield from keys(_positional(rest, options)[0], current)
    elif given < len(positional):
        yield from _of_positional(name, action)


def _positional(words: Sequence[str], options: dict[str, argparse.Action]) -> list[str]:
    """The words that belong to no option."""
    found, is_value = [], False
    for word in words:
        if is_value:
            is_value = False
        elif word in options:
            is_value = options[word].nargs != 0
        elif not word.startswith("-"):
            found.append(word)
    return found


def _of_positional(command: str, action: argparse.Action) -> Iterator[str]:
    if action.choices is not None:
        yield from map(str, action.choices)
    elif action.dest == "recipe" or command == "recipes":
        yield from packaged_recipes()
        yield from map(str, sorted(Path().glob("*.y*ml"))) if action.dest == "recipe" else ()
    elif command == "algorithms":
        yield from ALGORITHMS


def keys(recipe: str, current: str) -> Iterator[str]:
    """Overrides: keys one level at a time, each block's with a dot behind it, and the values of a key that has few.

    Args:
        recipe: The file, whose stages may be named.
    """
    prefix, stages = "", _stages(recipe)
    if current.startswith("stages."):
        stage = current.split(".")[1]
        if stage not in stages or current.count(".") < 2:
            yield from (f"stages.{name}." for name in stages)
            return
        prefix = f"stages.{stage}."
    key, equals, _ = current.removeprefix(prefix).partition("=")
    owner = key.rpartition(".")[0]
    blocks = blocks_at().get(owner, {})
    if equals:
        last = key.rpartition(".")[2]
        hints = [hint for block in blocks for hint in _hints(block, last)]
        yield from (f"{prefix}{key}={value}" for hint in hints for value in _values(hint))
        return
    for block in blocks:
        for field, info in block.model_fields.items():
            if (owner, field) == ("", "stage"):
                continue
            path = f"{owner}.{field}" if owner else field
            is_list = typing.get_origin(info.annotation) is list
            yield f"{prefix}{path}." if list(blocks_in(info.annotation)) and not is_list else f"{prefix}{path}="
    if not owner and not prefix and stages:
        yield "stages."


def _stages(recipe: str) -> list[str]:
    path = Path(recipe)
    if not path.is_file():
        path = packaged_recipes().get(path.stem, path)
    try:
        stages = read_document(path, []).data.get("stages", [])
    except RecipeError:
        return []
    return [stage["name"] for stage in stages if isinstance(stage, dict) and isinstance(stage.get("name"), str)]


def _hints(block: type[Block], field: str) -> Iterator[Any]:
    if field in block.model_fields:
        yield block.model_fields[field].annotation


def _values(hint: Any) -> Iterator[str]:
    """Of a type that has few."""
    if hint is bool:
        yield from ("true", "false")
    elif typing.get_origin(hint) is typing.Literal:
        yield from map(str, typing.get_args(hint))
    elif typing.get_origin(hint) is not list:
        for argument in typing.get_args(hint):
            yield from _values(argument)
