"""Lines of a growing metrics.jsonl, read in pieces: a few that are spread over it, or what came since."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlflow.tracking.jsonl import parse_row

WINDOW = 8 << 10
"""Bytes that are read at a time in search of a line."""
MAX_LINE = 1 << 20
"""Bytes of the longest line that is looked for."""
TAIL = 64 << 10
"""Bytes at the end of a file, whose lines tell how fast a run is now."""

Row = dict[str, Any]


def sample_rows(path: Path, count: int) -> list[Row]:
    """Reads about ``count`` lines spread evenly over a file, by byte, the first and the last whole one among them.

    What this takes does not depend on the file's length.
    """
    with path.open("rb", buffering=0) as file:
        descriptor, size = file.fileno(), os.fstat(file.fileno()).st_size
        rows = [row for index in range(count - 1) if (row := _row_at(descriptor, size * index // count)) is not None]
    rows += tail_rows(path)[-1:]
    return list({row["step"]: row for row in rows}.values())


def tail_rows(path: Path) -> list[Row]:
    """The whole lines among the last `TAIL` bytes; one at least where the file has one and it is not too long."""
    with path.open("rb", buffering=0) as file:
        descriptor, size = file.fileno(), os.fstat(file.fileno()).st_size
        length = min(size, TAIL)
        while True:
            data = os.pread(descriptor, length, size - length)
            lines = data.split(b"\n")[:-1]
            if length < size:
                lines = lines[1:]
            if lines or length == size or length > MAX_LINE:
                break
            length = min(size, 4 * length)
    return [row for line in lines if (row := parse_row(line)) is not None]


def number_in(row: Row, key: str) -> float | None:
    """A finite number, or None."""
    value = row.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


def _row_at(descriptor: int, offset: int) -> Row | None:
    """The first whole line that begins at or behind ``offset``."""
    length = WINDOW
    while length <= MAX_LINE:
        # One byte more before it tells whether a line begins right there.
        start = max(0, offset - 1)
        data = os.pread(descriptor, length, start)
        begin = 0 if offset == 0 else data.find(b"\n") + 1
        end = data.find(b"\n", begin) if begin or offset == 0 else -1
        if end >= 0:
            return parse_row(data[begin:end])
        if len(data) < length:
            return None
        length *= 4
    return None


@dataclass(frozen=True, slots=True)
class Rows:
    """Whole lines behind a place of a file, metric by metric."""

    file: str
    """Which file it is: another one where a resumed run has replaced it."""
    is_anew: bool
    """Whether what was read before no longer counts: the file is another, or shorter."""
    offset: int
    """Where to read on."""
    steps: list[int]
    times: list[float | None]
    metrics: dict[str, list[float | None]]
    """Null where a step lacks it or it was no finite number."""

    @classmethod
    def none(cls) -> Rows:
        """Those of a file that is not there yet."""
        return cls("", True, 0, [], [], {})


def rows_behind(path: Path, offset: int, file: str) -> Rows:
    """Reads the lines that came since.

    Args:
        offset: Where the last call ended.
        file: What it was told of the file; empty for the first call.
    """
    with path.open("rb") as stream:
        found = os.fstat(stream.fileno())
        name = f"{found.st_dev}-{found.st_ino}"
        is_anew = name != file or not 0 <= offset <= found.st_size
        begin = 0 if is_anew else offset
        stream.seek(begin)
        data = stream.read()
    end = data.rfind(b"\n") + 1
    by_step: dict[int, Row] = {}
    for line in data[:end].split(b"\n"):
        if (row := parse_row(line)) is not None:
            by_step.setdefault(int(row["step"]), {}).update(row)
    rows = [by_step[step] for step in sorted(by_step)]
    keys = dict.fromkeys(key for row in rows for key in row if key not in ("step", "time"))
    return Rows(
        name,
        is_anew,
        begin + end,
        [int(row["step"]) for row in rows],
        [number_in(row, "time") for row in rows],
        {key: [None if (value := number_in(row, key)) is None else _short(value) for row in rows] for key in keys},
    )


def _short(value: float) -> float:
    """Six significant places: more cannot be seen in a chart, and makes the answer twice as long."""
    return float(f"{value:.6g}")
