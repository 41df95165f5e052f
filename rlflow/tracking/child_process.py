"""The process that has a tracker's library: ``python child_process.py <name>``, JSON lines on standard input, lines for
people on standard output.

    {"start": {...}}                         what `<name>_sink.py`'s Sink is made with, first
    {"step": 3, "metrics": {...}}            one step, any number of times
    {"step": 3, "histograms": {...}, "samples": [...]}   what the policy wrote in a step, or either of the two
    {"summary": {...}}                       the run reached its end, last; without it the run is marked as failed

A process of its own because such libraries wait for their service without a deadline, at the interpreter's exit too,
and listen to signals: here neither can reach the training run. It runs as a script and imports nothing of rlflow but
the sink beside it. What a library prints goes to the log.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

ORPHAN_SECONDS = 60.0
"""How long it may go on when nobody waits for it any more."""

Say = Callable[[str], None]
Histogram = tuple[Sequence[int], Sequence[float]]
"""Counts [B], edges [B + 1]."""


class Sink(Protocol):
    """A tracker's library. Made with the arguments that the driver gave, and a function that tells people a line."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes a step; values may be NaN or infinite."""

    def show(self, step: int, histograms: Mapping[str, Histogram], samples: Sequence[Mapping[str, Any]]) -> None:
        """Takes what the policy wrote in a step; either may be empty."""

    def finish(self, summary: Mapping[str, float], *, is_whole: bool) -> None:
        """Ends; ``is_whole`` is whether the run had reached its end."""


def main() -> None:
    name = sys.argv[1]
    people = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    os.dup2(2, 1)

    def say(text: str) -> None:
        print(text, file=people, flush=True)

    started = json.loads(sys.stdin.readline())["start"]
    try:
        sink: Sink = _sink_of(name)(started, say)
    except Exception as error:  # a library that cannot start; the run goes on without it
        traceback.print_exc()
        say(f"{name} cannot start: {type(error).__name__}: {str(error).strip().splitlines()[:1] or ''}")
        sys.exit(1)
    summary: dict[str, float] | None = None
    is_told = False
    for line in sys.stdin:
        said = json.loads(line)
        try:
            if "summary" in said:
                summary = said["summary"]
            elif "metrics" in said:
                sink.log(said["step"], said["metrics"])
            else:
                sink.show(said["step"], said.get("histograms", {}), said.get("samples", []))
        except Exception as error:  # one step that a library does not take; the next one it may
            traceback.print_exc()
            if not is_told:
                say(f"{name} did not take step {said.get('step')}: {type(error).__name__}: {error}")
            is_told = True
    watchdog = threading.Timer(ORPHAN_SECONDS, os._exit, [1])
    watchdog.daemon = True
    watchdog.start()
    sink.finish(summary or {}, is_whole=summary is not None)


def _sink_of(name: str) -> Callable[[Mapping[str, Any], Say], Sink]:
    """The sink of this directory, without the package around it."""
    path = Path(__file__).with_name(f"{name}_sink.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Sink


if __name__ == "__main__":
    main()
