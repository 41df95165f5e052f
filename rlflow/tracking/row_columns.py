"""The columns of a data row that reward functions saw, as bounded JSON text; what is not kept exactly is named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_CHARACTERS = 65_536
"""Of one row's columns together. Smaller values are kept whole first."""
KEPT_OF_LONG = 1_000
"""Characters that are kept of a value that finds no room."""


@dataclass(frozen=True, slots=True)
class KeptColumns:
    """What a file holds of a row's columns."""

    text: str
    """A JSON object, name -> value."""
    inexact: tuple[str, ...]
    """The columns whose value there is not the one that rewards saw: cut short, or text in place of what JSON lacks."""


def keep_columns(columns: Mapping[str, Any]) -> KeptColumns:
    """Writes a row's columns down.

    A value that JSON does not hold (a date, bytes, NaN, a key that is no text) is kept as its text, one for which there
    is no room as the beginning of its text. Both are named as inexact.
    """
    whole: dict[str, str] = {}
    inexact: dict[str, str] = {}
    for name, value in columns.items():
        try:
            whole[name] = exact_json(value)
        except (TypeError, ValueError, RecursionError):
            inexact[name] = _text_of(value)
    room = MOST_CHARACTERS
    for name in sorted(whole, key=lambda name: len(whole[name])):
        room -= len(whole[name])
        if room < 0:
            value = columns[name]
            inexact[name] = value if isinstance(value, str) else whole[name]
            del whole[name]
    kept = {
        name: whole[name] if name in whole else json.dumps(inexact[name][:KEPT_OF_LONG], ensure_ascii=False)
        for name in columns
    }
    text = ", ".join(f"{json.dumps(name, ensure_ascii=False)}: {value}" for name, value in kept.items())
    return KeptColumns(f"{{{text}}}", tuple(name for name in columns if name in inexact))


def _text_of(value: Any) -> str:
    try:
        return str(value)
    except (ValueError, RecursionError) as error:
        return f"[{type(value).__name__}: {error}]"


def exact_json(value: Any) -> str:
    """The JSON text that reads as the same value.

    Raises:
        TypeError, ValueError, RecursionError: There is none.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    text.encode()  # half of a surrogate pair has no UTF-8
    if json.loads(text) != value:
        raise ValueError("a tuple, or a key that is no text: a reward could tell it from what JSON makes of it")
    return text
