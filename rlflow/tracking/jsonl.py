"""metrics.jsonl: one JSON object a step, the record that everything else can be made from."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from rlflow.checkpoint import naming_the_disk
from rlflow.tracking.tracker import Tracker
from rlflow.types import StepStats

_MOST_DIGITS = 15
SYNC_SECONDS = 5.0
"""A line survives the death of the process at once, and of the machine after this long."""


class JsonlTracker(Tracker):
    """Appends ``{"step": 12, "time": 1732168800.123, "reward/mean": 0.4, ...}``; NaN and infinities are null.

    The first step logged replaces itself and all later lines, so a resumed run's file equals that of a run never
    stopped. Raises DiskError when the disk is full: a run without a record should stop.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._synced = time.monotonic()

    def log(self, stats: StepStats) -> None:
        if self._file is None:
            keep_before(self.path, stats.step)
            self._file = self.path.open("ab", buffering=0)
        numbers = {name: _finite(value) for name, value in stats.metrics.items()}
        line = {"step": stats.step, "time": round(time.time(), 3)} | numbers
        left = json.dumps(line, allow_nan=False).encode() + b"\n"
        with naming_the_disk(self.path):
            while left:
                left = left[self._file.write(left) :]
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        if self._file is not None and not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()


def keep_before(path: Path, step: int) -> None:
    """Cuts the lines of ``step`` and later, and a last line that was cut short; the file is replaced atomically."""
    if not path.exists():
        return
    kept = b"".join(line for line, row in _rows(path) if row["step"] < step)
    if len(kept) == path.stat().st_size:
        return
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The steps of a metrics.jsonl in order, ``step`` and ``time`` among the keys; null becomes NaN.

    Lines of the same step are merged, the later value wins. What is no number is left out, and so are lines that are no
    JSON object (cut short).
    """
    steps: dict[int, dict[str, float]] = {}
    for _, row in _rows(path):
        numbers = {
            name: math.nan if value is None else float(value)
            for name, value in row.items()
            if value is None or isinstance(value, int | float)
        }
        steps.setdefault(int(row["step"]), {}).update(numbers)
    return [steps[step] for step in sorted(steps)]


def parse_row(line: bytes) -> dict[str, Any] | None:
    """What a line says; None when it is no JSON object of a step, as others or a full disk may leave one."""
    try:
        row = json.loads(line, parse_int=_parse_int)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Every whole line and what it says."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n") and (row := parse_row(line)) is not None:
                yield line, row


def _parse_int(digits: str) -> int | float:
    """What no float holds exactly is no step, and may be larger than any float."""
    return int(digits) if len(digits) <= _MOST_DIGITS else float(digits)


def _finite(value: float) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None
