"""What every block of a recipe has in common: unknown keys are errors, and so are values that do not go together."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Annotated, Any, NamedTuple

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


FUNCTION = "function"
"""The kind of a block that is a function of the user's own; ``file.py:function`` in its place stands for it."""


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _says_its_kinds(cls, given: Any) -> Any:
        """Blocks of several kinds are of the first where they name none; a function's path names its kind."""
        if not isinstance(given, dict):
            return given
        for field, kinds in kinds_in(cls).items():
            block = given.get(field)
            if not isinstance(block, dict):
                continue
            if kinds.key not in block:
                given = {**given, field: {kinds.key: next(iter(kinds.names)), **block}}
            elif FUNCTION in kinds.names and is_function(block[kinds.key]):
                given = {**given, field: {**block, kinds.key: FUNCTION, "plugin": block[kinds.key]}}
        return given

    def conflicts(self) -> Iterable[Conflict]:
        """Combinations of this block's values that make no sense."""
        return ()

    def idle(self, option: str, switch: str) -> Iterator[Conflict]:
        """The conflict of an option that was set where ``switch``, another key of the block, was left off.

        Switched off on purpose, as for an ablation, it may leave its options where they are.
        """
        default = type(self).model_fields[option].default
        if getattr(self, option) != default and not getattr(self, switch) and switch not in self.model_fields_set:
            yield Conflict((option, switch), f"has no effect without {switch}: remove it, or set it to {default}")

    @model_validator(mode="after")
    def _has_no_conflicts(self, info: ValidationInfo) -> Block:
        if info.context != LATER and (found := list(self.conflicts())):
            raise ValueError("; ".join(f"{conflict.keys[0]}: {conflict.reason}" for conflict in found))
        return self


def blocks_in(hint: Any) -> Iterator[type[Block]]:
    """Every class of block in a type."""
    if isinstance(hint, type) and issubclass(hint, Block):
        yield hint
    for argument in typing.get_args(hint):
        yield from blocks_in(argument)


class Kinds(NamedTuple):
    """The kinds of block that a field may hold, told apart by a key of theirs: a discriminated union."""

    key: str
    names: dict[str, type[Block]]
    """Value of the key -> kind, the default first."""

    def of(self, given: Mapping[str, Any]) -> type[Block] | None:
        """The kind of a block as it was given; None where it names none that there is."""
        name = given.get(self.key, next(iter(self.names)))
        if FUNCTION in self.names and is_function(name):
            return self.names[FUNCTION]
        return self.names[name] if name in list(self.names) else None

    @property
    def shared(self) -> set[str]:
        """The keys that every kind has."""
        return set.intersection(*(set(kind.model_fields) for kind in self.names.values()))


@cache
def kinds_in(block: type[Block]) -> dict[str, Kinds]:
    """The fields of a block that hold one of several kinds."""
    found = {}
    for field, info in block.model_fields.items():
        if isinstance(key := info.discriminator, str):
            kinds = list(blocks_in(info.annotation))
            found[field] = Kinds(key, {n: k for k in kinds for n in typing.get_args(k.model_fields[key].annotation)})
    return found


def exactly_one(**given: object) -> str:
    """What to do where one of these keys must be given, and none or several are: they may come from several files and
    the command line."""
    names = " or ".join(given)
    if all(value is None for value in given.values()):
        return f"give {names}"
    last = [name for name, value in given.items() if value is not None][-1]
    return f"give {names}, not both ({last}: null takes it away)"


def is_function(name: Any) -> bool:
    """Whether a kind is a ``file.py:function``."""
    return isinstance(name, str) and ".py:" in name


def malformed_function(key: str, text: str) -> Iterator[Conflict]:
    """The conflict of a key that names no ``file.py:function``."""
    file, colon, function = text.rpartition(":")
    if not (colon and file.endswith(".py") and function.isidentifier()):
        yield Conflict((key,), f"{text} is not of the form file.py:function")
