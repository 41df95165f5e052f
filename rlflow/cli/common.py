"""What several commands share: the recipe's arguments, an example under every help."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn, Protocol

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
    """Says of an option that it does not know what to write instead, where that is a key of the recipe."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: .*?--([\w.]+)(=\S+)?", message)
        if unknown and "RECIPE" in self.format_usage():
            message += f" (keys of the recipe are set without dashes: {unknown[1]}{unknown[2] or '=...'})"
        super().error(message)


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
