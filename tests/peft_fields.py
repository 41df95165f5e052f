"""The fields of the configs of the installed PEFT, as ``rlflow/recipe/peft_fields.json`` has them.

python -m tests.peft_fields > rlflow/recipe/peft_fields.json      # after another PEFT is pinned
"""

from __future__ import annotations

import dataclasses
import enum
import json
import sys
import types
import typing
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from rlflow.recipe.peft_methods import METHODS

_OF_EVERY_CONFIG = {field.name for field in dataclasses.fields(peft.PeftConfig)}
_CHOSEN = {bool: "bool", int: "int", float: "float", str: "str", list: "list", dict: "dict", type(None): "null"}


def peft_fields() -> dict[str, dict[str, list[str]]]:
    """Method -> field -> the kinds of value that it takes; a literal one stands in quotes."""
    found = {}
    for name in sorted(METHODS):
        config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)]
        names = dict(vars(peft))
        for parent in reversed(config.__mro__):
            names |= vars(sys.modules[parent.__module__])
        hints = typing.get_type_hints(config, names)
        fields = [field.name for field in dataclasses.fields(config) if field.name not in _OF_EVERY_CONFIG]
        found[name] = {field: sorted(set(_kinds(hints[field]))) for field in fields}
    return found


def _kinds(hint: Any) -> list[str]:
    origin = typing.get_origin(hint) or hint
    if origin in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in _kinds(part)]
    if origin is typing.Literal:
        return [f"'{value}'" for value in typing.get_args(hint)]
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return [f"'{member.value}'" for member in origin]
    # A config within the config.
    return [_CHOSEN[origin]] if origin in _CHOSEN else []


if __name__ == "__main__":
    lines = [f'"{name}": {json.dumps(fields)}' for name, fields in peft_fields().items()]
    print("{\n" + ",\n".join(lines) + "\n}")
