"""The process that writes an actor's log: what it and its children print comes in, lines without secrets go to a file.

    actor, and what it starts --descriptors 1 and 2--> pipe --> this process --> RUN/logs/<role>-<rank>.log

A process of its own, because the last words matter most: what an actor said before it was killed is still in the pipe,
and a thread of the actor's would have died with it, or waited for an interpreter that is busy. It ends when nobody has
the pipe open any more. It runs as a script, and imports nothing but the standard library and `redact.py` beside it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

LARGEST_BYTES = 32 << 20
"""Of a log: beyond, it becomes ``<name>.log.1``, in the place of an earlier one, and the log begins anew."""
LONGEST_LINE = 1 << 16
FLUSH_S = 1.0
"""A line that has not ended is written after this long: a prompt, or the last words of what hangs."""
MARK = "==="
"""Begins the lines that say when a process began to write, and when its output ended."""

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-_])")
_RAYS = re.compile(r"^:(?:actor_name|task_name|job_id):.*$")
"""Lines by which Ray's log monitor knows whose output follows."""


class Log:
    """Appends lines to a file. A disk that is full loses lines, and holds nobody up."""

    def __init__(self, path: Path, clean: Callable[[str], str]) -> None:
        self._path, self._clean = path, clean

    def mark(self, text: str) -> None:
        self._append(f"{MARK} {time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def write(self, lines: bytes) -> None:
        """Args: lines: As they were printed, the last one perhaps without its end."""
        readable = [readable_line(line) for line in lines.decode(errors="replace").removesuffix("\n").split("\n")]
        kept = [line for line in readable if not _RAYS.match(line)]
        if kept:
            self._append(self._clean("\n".join(kept)) + "\n")

    def _append(self, text: str) -> None:
        try:
            if self._path.exists() and self._path.stat().st_size > LARGEST_BYTES:
                os.replace(self._path, f"{self._path}.1")
            with self._path.open("ab") as file:
                file.write(text.encode(errors="replace"))
        except OSError:
            return


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    first, rest = _first_line(sys.stdin.fileno())
    told = json.loads(first)
    redact = _beside("redact")
    redact.remember_secrets({"secret": told["secrets"]})
    log = Log(Path(told["path"]), redact.redact_text)
    copy_lines(sys.stdin.fileno(), log, rest)
    log.mark(f"{told['who']} has ended")


def copy_lines(source: int, log: Log, pending: bytes = b"") -> None:
    """Writes what comes, whole lines at a time, until the other end is closed by all who had it."""
    while True:
        ready, _, _ = select.select([source], [], [], FLUSH_S if pending else None)
        part = os.read(source, 1 << 16) if ready else b""
        whole, end, left = (pending + part).rpartition(b"\n")
        if end:
            log.write(whole + end)
        pending = left
        if pending and (not part or len(pending) > LONGEST_LINE):
            log.write(pending)
            pending = b""
        if ready and not part:
            return


def readable_line(line: str) -> str:
    """A line as a terminal would show it in the end: of a progress bar its last state, without colours."""
    shown = _ESCAPES.sub("", line.rstrip("\r")).rpartition("\r")[2]
    return "".join(c if c.isprintable() or c == "\t" else "?" for c in shown)


def _first_line(source: int) -> tuple[bytes, bytes]:
    read = b""
    while b"\n" not in read and (part := os.read(source, 1 << 16)):
        read += part
    first, _, rest = read.partition(b"\n")
    return first, rest


def _beside(name: str) -> ModuleType:
    """A module of this directory, without the package around it: that takes longer to import than all the rest."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
