"""What is wrong with data, and how it reaches the user.

A row that cannot be used raises RowError where that is noticed; the loader turns it into a BadRow, and too many of
those into one DataError that names them.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

LISTED = 10
"""How many rows one error lists."""


class DataError(ValueError):
    """The data cannot be used as it is. The message names file, row and field, and says what to do."""


class RowError(ValueError):
    """Why one row cannot be used, without its place: the loader adds it."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is left out, or that stops the run, or of which something is missing."""

    source: str
    """File, hub id or generator."""
    row: int
    """From 1: the line of a JSONL or text file, the record of any other."""
    reason: str

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}: {self.reason}"


class Rows(list[T]):
    """The rows that can be used; ``skipped``: those that were left out, each with its reason; ``notes``: what is
    missing of rows that are used."""

    def __init__(self, rows: Iterable[T] = (), skipped: Sequence[BadRow] = (), notes: Sequence[BadRow] = ()) -> None:
        super().__init__(rows)
        self.skipped: list[BadRow] = list(skipped)
        self.notes: list[BadRow] = list(notes)


def listing(lines: Sequence[object], most: int = LISTED) -> str:
    """The first few, a line each, and how many more there are."""
    shown = [f"\n  {line}" for line in lines[:most]]
    if len(lines) > most:
        shown.append(f"\n  and {len(lines) - most} more")
    return "".join(shown)


def spans(numbers: Sequence[int], most: int = LISTED) -> str:
    """Ascending numbers as ``1 to 3, 7``, the first few, and how many more there are."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    shown = [str(first) if first == last else f"{first} to {last}" for first, last in found[:most]]
    left = sum(last - first + 1 for first, last in found[most:])
    return ", ".join(shown) + (f" and {left} more" if left else "")


def counted(number: int, thing: str) -> str:
    """``1 picture``, ``2 pictures``."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def nearest(name: str, names: Iterable[str]) -> str:
    """`` Nearest: a, b.``, or nothing when no name comes near."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)
    return f" Nearest: {', '.join(close)}." if close else ""


def nearest_beside(path: Path) -> str:
    """What comes near a path where there is no file, or why the one of that name is none."""
    if path.is_symlink():
        return f" It is a link to {os.readlink(path)}, which is not there."
    if path.exists():
        return " What bears that name is no plain file."
    return nearest(path.name, [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else [])
