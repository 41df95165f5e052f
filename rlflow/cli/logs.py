"""`rlflow logs`: what a run and each of its actors printed."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rlflow.cli.common import parser_of
from rlflow.tracking.history import HistoryError
from rlflow.tracking.lines import duration
from rlflow.tracking.logs import LogFile, choose_logs, find_logs, follow, last_lines

SUMMARY = "list, print or follow what a run and each of its actors printed"


def make_parser() -> argparse.ArgumentParser:
    parser = parser_of("logs", SUMMARY, "rlflow logs runs/gsm8k rollout-0 --follow")
    parser.add_argument("directory", metavar="RUN", type=Path, help="a run's directory, or that of its stages")
    parser.add_argument(
        "actor",
        metavar="ACTOR",
        nargs="?",
        help="run, rollout-0, a whole role (rollout), or of one stage grpo/rollout-0; left out, the logs are listed",
    )
    parser.add_argument(
        "--follow", "-f", action="store_true", help="go on printing what is added, of all logs where ACTOR is left out"
    )
    parser.add_argument("--lines", "-n", metavar="N", type=int, default=40, help="the last N lines of each; 0: none")
    return parser


def execute(arguments: argparse.Namespace) -> int:
    try:
        logs = find_logs(arguments.directory)
        chosen = logs if arguments.actor is None else choose_logs(logs, arguments.actor)
    except HistoryError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.actor is None and not arguments.follow:
        print("\n".join(table(logs, time.time())))
        return 0
    show = _Printer(chosen)
    for log in chosen if arguments.actor is not None else ():
        for line in last_lines(log.path, max(0, arguments.lines)):
            show(log, line)
    try:
        for added in follow(chosen) if arguments.follow else ():
            if added is None:
                sys.stdout.flush()
            else:
                show(*added)
    except KeyboardInterrupt:
        return 0
    return 0


def table(logs: Sequence[LogFile], now: float) -> list[str]:
    """Name, size and age of each, as columns."""
    rows = [
        (log.name, size_text(log.size), f"{duration(max(0.0, now - log.modified))} ago", str(log.path)) for log in logs
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [f"{name:<{widths[0]}}  {size:>{widths[1]}}  {age:>{widths[2]}}  {path}" for name, size, age, path in rows]


def size_text(size: int) -> str:
    """Bytes as people say them: 940 B, 12 KiB, 3.4 MiB."""
    if size < 1 << 10:
        return f"{size} B"
    for unit, name in ((1 << 20, "KiB"), (1 << 30, "MiB")):
        if size < unit:
            value = size / (unit >> 10)
            return f"{value:.1f} {name}" if value < 10 else f"{value:.0f} {name}"
    return f"{size / (1 << 30):.1f} GiB"


class _Printer:
    """Prints lines, each behind its log's name where there are several."""

    def __init__(self, logs: Sequence[LogFile]) -> None:
        self._width = max(len(log.name) for log in logs) if len(logs) > 1 else 0

    def __call__(self, log: LogFile, line: str) -> None:
        text = f"{log.name:<{self._width}} | {line}" if self._width else line
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding))
