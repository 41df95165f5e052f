"""What a flag of another framework is in a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Family = Literal["", "online", "sft", "preference"]


@dataclass(frozen=True, slots=True)
class Row:
    """One flag."""

    kind: Literal["key", "fold", "unneeded", "missing"]
    """key: it is a key of the recipe; fold: a function works it out together with others; unneeded: there is nothing
    to set here; missing: what it does is not done here."""
    key: str = ""
    """The dotted key that it becomes, or where to look."""
    note: str = ""
    """What to know of it."""
    default: Any = None
    """The other framework's, where a recipe must say it to mean the same."""
    read: Callable[[Any], Any] | None = None
    """From its value to ours; None leaves the key out."""
    family: Family = ""
    """The only family of algorithms that has the key."""
    neutral: tuple[Any, ...] = ()
    """Values of a missing flag that switch off what it does."""


def key(
    name: str, note: str = "", *, default: Any = None, read: Callable[[Any], Any] | None = None, of: Family = ""
) -> Row:
    return Row("key", name, note, default, read, of)


def fold(name: str = "", note: str = "", *, default: Any = None) -> Row:
    return Row("fold", name, note, default)


def unneeded(note: str, name: str = "") -> Row:
    return Row("unneeded", name, note)


def missing(note: str, *neutral: Any, name: str = "") -> Row:
    """``neutral``: values, beside null, false, 0 and an empty list, that switch off what the flag does."""
    return Row("missing", name, note, neutral=(None, False, 0, [], "", "none", *neutral))


Table = Mapping[str, Row]


def find_row(table: Table, name: str) -> Row | None:
    """A flag's row, or that of the nearest block above it that has one: ``trainer.profiler.*``."""
    if name in table:
        return table[name]
    parts = name.split(".")
    for size in range(len(parts) - 1, 0, -1):
        if (row := table.get(".".join([*parts[:size], "*"]))) is not None:
            return row
    return None


def as_list(value: Any) -> list[Any]:
    """A value that may be one or several."""
    return value if isinstance(value, list) else [] if value is None else [value]


def each(names: str, row: Row) -> dict[str, Row]:
    """The same row for several flags."""
    return dict.fromkeys(names.split(), row)
