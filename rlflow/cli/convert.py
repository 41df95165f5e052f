"""`rlflow convert`: a command line, a script or a configuration of another framework as a recipe."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from rlflow.cli.common import CommandParser, parser_of
from rlflow.convert import Conversion, convert
from rlflow.data.errors import DataError
from rlflow.text_files import write_text

SUMMARY = "turn a command of ms-swift, TRL or verl into a recipe"
_SAID = {"missing": "without a counterpart", "to do": "to do", "trap": "to look at first"}


class _Parser(CommandParser):
    """Takes what is behind ``--`` as it is: the flags in it are another program's."""

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        place = args.index("--") if "--" in args else len(args)
        own, behind = args[:place], args[place + 1 :]
        return super().parse_intermixed_args([*own, shlex.join(behind)] if behind else own, namespace)

    def error(self, message: str) -> NoReturn:
        super().error(
            f"{message} (put the whole command in quotes, or behind --)" if "unrecognized" in message else message
        )


def make_parser() -> argparse.ArgumentParser:
    example = (
        'rlflow convert "swift rlhf --rlhf_type grpo --model Qwen/Qwen3-8B --dataset d.jsonl --reward_funcs accuracy"\n'
        "  rlflow convert train.sh -o recipe.yaml\n"
        "  rlflow convert -- trl grpo --config grpo.yaml"
    )
    parser = parser_of("convert", SUMMARY, example, _Parser)
    help_ = "a command line in quotes or behind --, a shell script, or - for the standard input"
    parser.add_argument("command", metavar="COMMAND", nargs="+", help=help_)
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="write the recipe there; several get -1, -2, ..."
    )
    parser.add_argument("--gpus", metavar="N", type=int, help="GPUs of the training, where the command does not say it")
    return parser


def execute(arguments: argparse.Namespace) -> int:
    conversions = convert(_script(arguments.command), arguments.gpus)
    recipes = [found for found in conversions if found.recipe is not None]
    if not recipes and not any(found.command for found in conversions):
        raise DataError("\n".join(note.text for found in conversions for note in found.notes))
    for number, found in enumerate(recipes, 1):
        _write(found, arguments.output, number if len(recipes) > 1 else 0)
    for found in conversions:
        if found.command is not None:
            print(found.command)
        _summarise(found)
    return 0


def _script(words: list[str]) -> str:
    """What is to be converted, as the text of a script."""
    if len(words) > 1:
        return shlex.join(words)
    [word] = words
    if word == "-":
        return sys.stdin.read()
    path = Path(word)
    is_file = os.path.isfile(word)  # False of a command that is too long for a name, which Path.is_file raises on
    if is_file and path.suffix in (".yaml", ".yml", ".json"):
        raise DataError(
            f"{word}: say whose it is, by its command: `rlflow convert -- trl grpo --config {shlex.quote(word)}`, or "
            "behind `-- swift sft`"
        )
    if is_file:
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{word} is no text (byte {error.start}): name a shell script") from error
    if " " not in word.strip():
        raise DataError(f"there is no file {word}, and it is no command: put the whole command in quotes, or behind --")
    return word


def _write(found: Conversion, output: Path | None, number: int) -> None:
    assert found.recipe is not None
    if output is None:
        print(f"---\n{found.recipe}" if number > 1 else found.recipe, end="")
        return
    path = output.with_stem(f"{output.stem}-{number}") if number else output
    if path.exists():
        raise DataError(f"{path} is there already: name another file")
    try:
        write_text(path, found.recipe)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from error
    print(path)


def _summarise(found: Conversion) -> None:
    """The notes that matter, on standard error; the recipe's comments have all of them."""
    counts = Counter(note.kind for note in found.notes)
    said = [f"{counts[kind]} {text}" for kind, text in _SAID.items() if counts[kind]]
    print(f"{found.title}: {', '.join(said) or 'converted'}", file=sys.stderr)
    for note in found.notes:
        if note.kind in ("trap", "to do") or (note.kind == "missing" and found.recipe is None):
            print(f"  {note.kind}: {note.text}", file=sys.stderr)
