"""What the text of a call's argument stands for, where a model writes arguments one by one and none as JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from typing import Any

_PYTHON = {"True": True, "False": False, "None": None}
"""What templates write that print a value as Python does: Qwen3.5's, Nemotron's."""


def types_of_arguments(tools: Sequence[Any], name: str) -> dict[str, set[str]]:
    """The JSON types of each argument of a function, as far as its schema says."""
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == name:
            properties = function.get("parameters", {}).get("properties", {})
            return {key: set(_types_of(schema)) for key, schema in properties.items()}
    return {}


def value_of(text: str, types: Collection[str]) -> Any:
    """What a text stands for: JSON or a word of Python's, but where a string is wanted or it is neither."""
    if types and not set(types) - {"string", "null"}:
        return None if "null" in types and text in ("null", "None") else text
    if text in _PYTHON:
        return _PYTHON[text]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    # Models write 2.0 where a whole number is wanted.
    is_whole = isinstance(value, float) and "integer" in types and "number" not in types and value.is_integer()
    return int(value) if is_whole else value


def _types_of(schema: Any) -> Iterator[str]:
    """The types that a schema names: one, a list, or those of its alternatives; transformers says of one that may be
    None that it is nullable."""
    if not isinstance(schema, dict):
        return
    named = schema.get("type", ())
    yield from [named] if isinstance(named, str) else named
    yield from ["null"] if schema.get("nullable") is True else []
    for alternatives in (schema.get("anyOf"), schema.get("oneOf")):
        for alternative in alternatives or ():
            yield from _types_of(alternative)
