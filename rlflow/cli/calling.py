"""A command is called: its failures become messages and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rlflow.cli.common import Command
from rlflow.data.errors import DataError
from rlflow.driver.errors import RunError, StopRequested
from rlflow.recipe import RecipeError
from rlflow.tracking.redact import redact_text, redact_tracebacks

FAILED, WRONG_INPUT, STOPPED = 1, 2, 3


def call(command: Command, arguments: Sequence[str]) -> int:
    """Runs a command. Returns the exit code; a failure that nobody foresaw leaves with its traceback."""
    redact_tracebacks()
    try:
        return command.execute(command.make_parser().parse_intermixed_args(arguments))
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
