"""A command is called: its failures become messages and exit codes."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence

from rlflow.cli.common import Command
from rlflow.data.errors import DataError
from rlflow.driver.errors import RunError, StopRequested
from rlflow.recipe import RecipeError
from rlflow.tracking.redact import redact_text, redact_tracebacks

FAILED, WRONG_INPUT, STOPPED = 1, 2, 3

_REMEDIES = {
    errno.EACCES: "another user's: have them allow it, or name another place",
    errno.EPERM: "another user's: have them allow it, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENOSPC: "make room, or name another place",
    errno.EDQUOT: "make room, or name another place",
    errno.EIO: "look at the disk, or name another place",
}
"""Of what no program can do anything about, by error number."""


def call(command: Command, arguments: Sequence[str]) -> int:
    """Runs a command. Returns the exit code; a failure that nobody foresaw leaves with its traceback."""
    redact_tracebacks()
    _open_streams()
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
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        place = "the output" if error.filename is None else error.filename
        print(redact_text(f"{place}: {error.strerror}; {_REMEDIES[error.errno]}"), file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return FAILED


def _open_streams() -> None:
    """Has input and outputs take whatever there is.

    Where the shell has closed an output (``>&-``) nobody listens; what the terminal's encoding lacks is written as an
    escape (``\\u2013``); bytes of the input that are no text come as half surrogate pairs, for the command to name.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
