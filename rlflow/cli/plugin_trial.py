"""What a check of a recipe's function sends to the process that tries it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Trial:
    """What is to be tried."""

    kind: Literal["reward", "generator", "environment", "function"]
    name: str | None
    """Of a built-in function."""
    plugin: str | None
    """``file.py:function``."""
    args: Mapping[str, Any]
    row: Mapping[str, Any] | None
    """Columns of a row of the data, with which a built-in reward is called once, on an empty completion; a plugin is
    only asked whether it needs others. None where the data was not read."""
    is_called: bool = False
    """Whether a generator is called and its rows are counted."""
    offered: tuple[str, ...] = ()
    """What another function may take by name."""
    num_positional: int = 0
    """What it is given by position; a class is made without them."""
    tools: Sequence[str] = ()
    """Functions that an environment of tools is made of."""
