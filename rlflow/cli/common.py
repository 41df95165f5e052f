"""What several commands share: the recipe's arguments, an example under every help."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
from typing import Any, NoReturn, Protocol

EXIT_CODES = (
    "exit codes: 0 done; 2 the recipe or data is wrong; 3 stopped on request, with a checkpoint; 1 anything else"
)


class Command(Protocol):
    """What a command's module has."""

    @property
    def SUMMARY(self) -> str:
        """Its line in ``rlflow --help``."""
        ...

    def make_parser(self) -> argparse.ArgumentParser: ...

    def execute(self, arguments: argparse.Namespace) -> int:
        """Does the work. Returns the exit code."""
        ...


class CommandParser(argparse.ArgumentParser):
    """Says in one line of an option that it does not know, or of another framework's command, what to write instead."""

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        if args and args[0] in _OTHER_PROGRAMS and self._takes_a_recipe and not os.path.exists(args[0]):
            self.error(f"{args[0]} is another framework's: rlflow convert -- {shlex.join(args)}")
        return super().parse_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        # argparse names all positional arguments, also those that may be left out.
        message = re.sub(r"(are required: .*), key=value$", r"\1", message)
        unknown = re.match(r"unrecognized arguments: .*?--([\w.]+)(=\S+)?", message)
        if unknown and self._takes_a_recipe:
            key = _key_of(unknown[1])
            message += f" (keys of the recipe are set without dashes: {key}{unknown[2] or '=...'})"
        elif meant := self._meant_by(message):
            message += f" (did you mean {meant}?)"
        self.exit(2, f"{self.prog}: error: {message}; `{self.prog} --help` lists what it takes\n")

    def _meant_by(self, message: str) -> str | None:
        """The option that the first argument which is none resembles: ``--top_p``, ``temperature=0.5``."""
        unknown = re.match(r"unrecognized arguments: (?:-*)([a-zA-Z][\w-]*)(=\S+)?", message)
        if unknown is None:
            return None
        name = f"--{unknown[1].replace('_', '-')}"
        close = difflib.get_close_matches(name, self._option_string_actions, 1, 0.75)
        return f"{close[0]}{unknown[2] or ''}" if close else None

    @property
    def _takes_a_recipe(self) -> bool:
        return any(action.dest == "recipe" and not action.option_strings for action in self._actions)


_OTHER_PROGRAMS = ("swift", "megatron", "trl", "accelerate", "torchrun", "deepspeed", "python", "python3")


def _key_of(option: str) -> str:
    """The key that an option is meant to be: its own name, what another framework's flag of this name is here, or the
    one key that ends so."""
    from rlflow.recipe import Recipe
    from rlflow.recipe.explain import blocks_at
    from rlflow.recipe.foreign.names import foreign_row

    if "." in option or option in Recipe.model_fields:
        return option
    if (row := foreign_row(option, "online")) is not None and row.key:
        return row.key
    owners = [path for path, blocks in blocks_at().items() if any(option in block.model_fields for block in blocks)]
    return f"{owners[0]}.{option}" if len(owners) == 1 else option


def parser_of(
    name: str, summary: str, example: str, kind: type[argparse.ArgumentParser] = CommandParser
) -> argparse.ArgumentParser:
    """A command's parser, with an example under its help."""
    return kind(
        prog=f"rlflow {name}",
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  {example}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def port_number(text: str) -> int:
    """A ``--port`` as argparse's type: the operating system would take a larger one for another."""
    if not text.isdecimal() or not 0 <= int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text} is no port: a number from 0 to 65535")
    return int(text)


def unicode_text(text: str) -> str:
    """A text for a tokenizer as argparse's type: bytes that are no UTF-8 come as half surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"what follows {text[: error.start]!r} is no UTF-8 text") from error
    return text


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a YAML file, or the name of one that comes with rlflow: `rlflow recipes`"
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="set a key of the recipe: trainer.learning_rate=2e-6, rewards.0.weight=2, stages.sft.run.steps=50",
    )
