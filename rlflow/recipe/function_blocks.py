"""Functions of the user's own, which a recipe names by `file.py:function`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic import Field, model_validator

from rlflow.recipe.block import Block, Conflict, malformed_function

_LABEL = re.compile(r"[A-Za-z0-9_.-]+")


class FunctionBlock(Block):
    """A block that is written as its ``plugin`` alone where it has no arguments."""

    plugin: str
    """Your own, `file.py:name`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments."""

    @model_validator(mode="before")
    @classmethod
    def _is_its_plugin(cls, given: Any) -> Any:
        return {"plugin": given} if isinstance(given, str) else given

    def conflicts(self) -> Iterator[Conflict]:
        yield from malformed_function("plugin", self.plugin)


class CallbackBlock(FunctionBlock):
    """A class, made with ``args``, whose methods hear what the run does, or a function of (step, metrics)."""


class MetricBlock(FunctionBlock):
    """A function of a step's groups of rollouts that returns a number, or several by name."""

    label: str = ""
    """Its metrics are `metric/<label>`; the function's name when absent."""

    @property
    def name(self) -> str:
        """What its metrics are called."""
        return self.label or self.plugin.rpartition(":")[2]

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.label and not _LABEL.fullmatch(self.label):
            yield Conflict(("label",), f"{self.label!r} is part of metrics' names: use letters, digits, _, - and .")
