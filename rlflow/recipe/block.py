"""What every block of a recipe has in common: unknown keys are errors, and so are values that do not go together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

Number = Annotated[float, Field(strict=True)]
PositiveFloat = Annotated[float, Field(strict=True, gt=0)]
NonNegativeFloat = Annotated[float, Field(strict=True, ge=0)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
LARGEST = 2**53
"""Of a whole number: beyond it, what makes a float of one changes it."""
PositiveInt = Annotated[int, Field(strict=True, gt=0, le=LARGEST)]
NonNegativeInt = Annotated[int, Field(strict=True, ge=0, le=LARGEST)]

LATER = {"conflicts": "later"}
"""Validation context under which conflicts are not raised: the loader collects them with their places."""


class Conflict(NamedTuple):
    """Values that are each fine and do not go together."""

    keys: tuple[str, ...]
    """Dotted keys below the block that says so; the error points at the first."""
    reason: str
    """What is wrong and what to do."""


class Block(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    def conflicts(self) -> Iterable[Conflict]:
        """Combinations of this block's values that make no sense."""
        return ()

    @model_validator(mode="after")
    def _has_no_conflicts(self, info: ValidationInfo) -> Block:
        if info.context != LATER and (found := list(self.conflicts())):
            raise ValueError("; ".join(f"{conflict.keys[0]}: {conflict.reason}" for conflict in found))
        return self


def exactly_one(**given: object) -> str:
    """What to do where one of these keys must be given, and none or several are."""
    names = " or ".join(given)
    return f"give {names}" if all(value is None for value in given.values()) else f"give {names}, not both"


def malformed_function(key: str, text: str) -> Iterator[Conflict]:
    """The conflict of a key that names no ``file.py:function``."""
    file, colon, function = text.rpartition(":")
    if not (colon and file.endswith(".py") and function.isidentifier()):
        yield Conflict((key,), f"{text} is not of the form file.py:function")
