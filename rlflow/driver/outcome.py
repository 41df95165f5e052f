"""How a stage ended, kept in its directory for whoever looks at it later: ``outcome.json``.

A stage that was killed says nothing: its lock file stays behind, of a process that is gone.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from rlflow.driver.errors import StoppedUnsaved, StopRequested
from rlflow.text_files import write_text
from rlflow.tracking.redact import redact_text

OUTCOME = "outcome.json"
LONGEST_MESSAGE = 4000
"""Characters that are kept of why a stage failed."""

Ending = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a stage ended, and when."""

    ending: Ending
    message: str
    """Why it did not finish; empty where it did."""
    time: float
    """Seconds since 1970."""


@contextmanager
def recording_outcome(directory: Path) -> Iterator[None]:
    """Writes down how the stage within ended."""
    try:
        yield
    except (StopRequested, StoppedUnsaved, KeyboardInterrupt) as stop:
        write_outcome(directory, "stopped", str(stop))
        raise
    except Exception as error:
        write_outcome(directory, "failed", f"{error}" or type(error).__name__)
        raise
    write_outcome(directory, "finished")


def write_outcome(directory: Path, ending: Ending, message: str = "") -> None:
    """Replaces what the directory said before. A disk that is full loses this, and nothing else fails for it."""
    outcome = Outcome(ending, redact_text(message)[:LONGEST_MESSAGE], round(time.time(), 3))
    with contextlib.suppress(OSError):
        write_text(directory / OUTCOME, json.dumps(asdict(outcome)) + "\n")


def forget_outcome(directory: Path) -> None:
    """Takes back what the directory says: its stage goes on."""
    with contextlib.suppress(OSError):
        (directory / OUTCOME).unlink(missing_ok=True)


def read_outcome(directory: Path) -> Outcome | None:
    """None where there is none, or it is damaged."""
    try:
        outcome = Outcome(**json.loads((directory / OUTCOME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return outcome if outcome.ending in get_args(Ending) else None
