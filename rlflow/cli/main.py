"""Entry point of `rlflow`: knows the commands' names, prints their list, calls one. Loads nothing that this does not
need: the list is there at once."""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlflow import __version__
from rlflow.cli.common import EXIT_CODES, Command, CommandParser

COMMANDS = (
    "run",
    "plan",
    "submit",
    "algorithms",
    "recipes",
    "convert",
    "report",
    "logs",
    "inspect",
    "ui",
    "export",
    "doctor",
    "completion",
    "infer",
    "serve",
    "eval",
)
"""Each is a module of rlflow.cli, imported when the command is called."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name not in COMMANDS:
        make_parser().parse_args([name])
    from rlflow.cli.calling import call

    return call(load_command(name), rest)


def load_command(name: str) -> Command:
    """The module of a command."""
    module: Any = importlib.import_module(f"rlflow.cli.{name}")
    return module


def summary_of(name: str) -> str:
    """A command's SUMMARY, by its source: importing every command would take as long as running one."""
    source = Path(__file__).with_name(f"{name}.py").read_bytes()
    for node in ast.parse(source).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="SUMMARY")], value=value):
                return ast.literal_eval(value)
    raise AssertionError(f"rlflow.cli.{name} has no SUMMARY")


def make_parser() -> argparse.ArgumentParser:
    """The parser of what stands before a command: it knows the commands' names and prints their list."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {summary_of(name)}" for name in COMMANDS)
    example = "rlflow run recipes/grpo_gsm8k_smollm2.yaml"
    parser = CommandParser(
        prog="rlflow",
        description=f"One recipe, from a laptop to a cluster.\n\ncommands:\n{listed}",
        epilog=f"example:\n  {example}\n\n`rlflow COMMAND --help` says more. {EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rlflow {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the above")
    return parser


if __name__ == "__main__":
    sys.exit(main())
