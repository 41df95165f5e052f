"""Entry point of `rlflow`: finds the command, turns failures into messages and exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from rlflow.cli import algorithms, export, plan, report, run, submit
from rlflow.cli.common import EXIT_CODES, Command
from rlflow.data.errors import DataError
from rlflow.driver.errors import RunError, StopRequested
from rlflow.recipe import RecipeError
from rlflow.tracking.redact import redact_text, redact_tracebacks

COMMANDS: dict[str, Command] = {
    "run": run,
    "plan": plan,
    "submit": submit,
    "algorithms": algorithms,
    "report": report,
    "export": export,
}

FAILED, WRONG_INPUT, STOPPED = 1, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code; a failure that nobody foresaw leaves with its traceback."""
    redact_tracebacks()
    try:
        name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
        if name not in COMMANDS:
            make_parser().parse_args([name])
        command = COMMANDS[name]
        return command.execute(command.make_parser().parse_intermixed_args(rest))
    except (RecipeError, DataError) as error:
        print(redact_text(str(error)), file=sys.stderr)
        return WRONG_INPUT
    except StopRequested as stop:
        print(redact_text(str(stop)), file=sys.stderr)
        return STOPPED
    except RunError as error:
        print(redact_text(str(error)), file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        # Whoever read our output has gone; Python must not complain about it once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return FAILED


def make_parser() -> argparse.ArgumentParser:
    """The parser of what stands before a command: it knows the commands' names and prints their list."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {command.SUMMARY}" for name, command in COMMANDS.items())
    example = "rlflow run recipes/grpo_gsm8k_smollm2.yaml"
    parser = argparse.ArgumentParser(
        prog="rlflow",
        description=f"One recipe, from a laptop to a cluster.\n\ncommands:\n{listed}",
        epilog=f"example:\n  {example}\n\n`rlflow COMMAND --help` says more. {EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the above")
    return parser


if __name__ == "__main__":
    sys.exit(main())
