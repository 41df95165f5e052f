"""Entry point of `rlflow`: knows the commands' names, prints their list, calls one. Loads nothing that this does not
need: the list is there at once."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rlflow import __version__
from rlflow.cli.common import EXIT_CODES, Command, CommandParser
from rlflow.garbage import without_collection

COMMANDS = (
    "run",
    "plan",
    "submit",
    "algorithms",
    "recipes",
    "convert",
    "infer",
    "serve",
    "eval",
    "export",
    "report",
    "logs",
    "inspect",
    "ui",
    "doctor",
    "completion",
)
"""Each is a module of rlflow.cli, imported when the command is called."""
CALLED_ELSEWHERE = {
    **dict.fromkeys(("train", "sft", "pt", "rlhf", "dpo", "grpo"), "run"),
    **dict.fromkeys(("chat", "generate", "sample", "rollout"), "infer"),
    **dict.fromkeys(("deploy", "vllm-serve", "server"), "serve"),
    **dict.fromkeys(("evaluate", "test", "benchmark"), "eval"),
    **dict.fromkeys(("merge-lora", "merge_lora", "merge", "quantize", "push"), "export"),
    **dict.fromkeys(("app", "web-ui", "webui", "dashboard"), "ui"),
    **dict.fromkeys(("env", "version", "check"), "doctor"),
    **dict.fromkeys(("list", "init"), "recipes"),
}
"""What ms-swift's, TRL's and others' users type, and the command that does it here."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name not in COMMANDS:
        make_parser().parse_args([name])
    from rlflow.cli.calling import call

    return call(load_command(name), rest)


def load_command(name: str) -> Command:
    """The module of a command."""
    with without_collection():
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


class _NamesParser(CommandParser):
    """Says of a word that is no command which one is meant."""

    def error(self, message: str) -> NoReturn:
        wrong = re.match(r"argument COMMAND: invalid choice: '(.*?)'", message)
        if wrong is None:
            super().error(message)
        word = wrong[1]
        near = [CALLED_ELSEWHERE[word]] if word in CALLED_ELSEWHERE else difflib.get_close_matches(word, COMMANDS, 1)
        meant = f" (did you mean rlflow {near[0]}?)" if near else ""
        self.exit(2, f"rlflow: error: there is no command {word}{meant}; `rlflow --help` lists them\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of what stands before a command: it knows the commands' names and prints their list."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {summary_of(name)}" for name in COMMANDS)
    example = "rlflow run recipes/grpo_gsm8k_smollm2.yaml"
    parser = _NamesParser(
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
