"""The types of a tool's arguments that transformers describes as an object of which nothing is known."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from typing import Any, get_args, get_origin, is_typeddict

_PLAIN: tuple[Any, ...] = (int, float, str, bool, dict, list, tuple, type(None), Any, ...)
"""What arguments that are read from a call can be."""


def with_types(schema: dict[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """A function's schema, as transformers makes it, with the keys of what is a TypedDict.

    Raises:
        ValueError: An argument is of a class of which a call can make no instance.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    properties = dict(schema["function"].get("parameters", {}).get("properties", {}))
    for name in properties:
        leaves = _leaves(hints[name])
        for leaf in leaves:
            if leaf not in _PLAIN and not is_typeddict(leaf):
                raise ValueError(
                    f"{name} is a {getattr(leaf, '__name__', leaf)}, of which a call can make none: take str, int, "
                    "float, bool, Literal, a list, a dict or a TypedDict, and make it of those"
                )
        if any(map(is_typeddict, leaves)):
            properties[name] = {**properties[name], **_schema_of(hints[name])}
    if not properties:
        return schema
    parameters = {**schema["function"]["parameters"], "properties": properties}
    return {**schema, "function": {**schema["function"], "parameters": parameters}}


def _leaves(hint: Any) -> list[Any]:
    """The types that a hint is made of, within TypedDicts too; values of a Literal are none."""
    if get_origin(hint) is typing.Literal:
        return []
    if is_typeddict(hint):
        inner = typing.get_type_hints(hint).values()
        return [hint, *(leaf for each in inner for leaf in _leaves(each))]
    arguments = get_args(hint)
    if get_origin(hint) is typing.Annotated:
        return _leaves(arguments[0])
    return [leaf for argument in arguments for leaf in _leaves(argument)] if arguments else [hint]


def _schema_of(hint: Any) -> dict[str, Any]:
    """JSON schema of a hint in which there are TypedDicts."""
    origin, arguments = get_origin(hint), get_args(hint)
    if is_typeddict(hint):
        hints = typing.get_type_hints(hint)
        properties = {name: _schema_of(each) for name, each in hints.items()}
        required = [name for name in hints if name in hint.__required_keys__]
        return {"type": "object", "properties": properties, "required": required}
    if origin is list and arguments:
        return {"type": "array", "items": _schema_of(arguments[0])}
    if origin is dict and len(arguments) == 2:
        return {"type": "object", "additionalProperties": _schema_of(arguments[1])}
    others = [argument for argument in arguments if argument is not type(None)]
    if origin in (typing.Union, types.UnionType) and len(others) == 1:
        return {**_schema_of(others[0]), "nullable": True}
    from transformers.utils.chat_template_utils import _parse_type_hint

    return _parse_type_hint(hint)
