"""Function calls: one form of them whatever a row has, and the form in which a chat template wants their arguments."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from rlflow.data.errors import RowError
from rlflow.types import Message

PROBE = {"zqx": "xqz"}
THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


def to_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """``{"type": "function", "function": {"name": ..., "arguments": {...}}}`` each, other keys kept.

    The arguments become an object: OpenAI writes them as JSON text, which most templates would quote once more.

    Raises:
        RowError: One has no name, or arguments that are no object.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"`{place}` is a function call that is not valid JSON: {error}") from None
    calls = value if isinstance(value, list) else [value]
    return [_to_call(call, place) for call in calls]


def to_tools(value: Any) -> list[dict[str, Any]]:
    """Descriptions of functions in OpenAI's form, from one or a list of them, each an object or its JSON text.

    Raises:
        RowError: They are no such descriptions.
    """
    try:
        value = json.loads(value) if isinstance(value, str) else value
        tools = value if isinstance(value, list) else [value]
        tools: list[Any] = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools]
    except (ValueError, RecursionError):
        tools = [None]
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError("`tools` is not a list of function descriptions")
    return [described(tool) for tool in tools]


def behind_thought(text: str) -> tuple[str, str]:
    """What is thought before a call, its tags included, and the call: LLaMA-Factory's data has both as one text."""
    found = THOUGHT.match(text)
    return (found[0], text[found.end() :]) if found else ("", text)


def with_arguments(messages: Sequence[Message], change: Callable[[dict[str, Any]], Any]) -> list[Message]:
    """The messages with other arguments in the place of all."""

    def changed(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": change(function["arguments"])}}

    return [
        {**message, "tool_calls": [changed(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def with_text_arguments(messages: Sequence[Message]) -> list[Message]:
    """The messages with all arguments as JSON text."""
    return with_arguments(messages, lambda arguments: json.dumps(arguments, ensure_ascii=False))


def is_python(messages: Sequence[Message], text: str, apply: Callable[[Sequence[Message]], str]) -> bool:
    """Whether a template writes arguments as Python does, which no parser of calls reads.

    Args:
        messages: The conversation.
        text: What it is rendered to. It may hold what looks like arguments for another reason.
        apply: Renders other messages alike.
    """
    functions = [call["function"] for message in messages for call in message.get("tool_calls", ())]
    if not any(str(function["arguments"]) in text for function in functions if not _is_alike(function)):
        return False
    return str(PROBE) in apply(with_arguments(messages, lambda _: PROBE))


def with_other_names(messages: Sequence[Message]) -> list[Message]:
    """The messages with a name of its own for every call, which no text has."""
    numbers = itertools.count()
    return [
        {**message, "tool_calls": [renamed(call, f"called_{next(numbers)}") for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def renamed(tool: dict[str, Any], name: str) -> dict[str, Any]:
    """A call or a described function under a name made of this one, which no text has."""
    function = tool.get("function")
    name = f"zqx_{name}_xqz"
    return {**tool, "function": {**function, "name": name}} if isinstance(function, dict) else {**tool, "name": name}


def function_name(tool: dict[str, Any]) -> str:
    """The name of what ``renamed`` returned."""
    return tool["function"]["name"] if isinstance(tool.get("function"), dict) else tool["name"]


def described(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool in OpenAI's form, which templates are written for: LLaMA-Factory's data has functions bare."""
    if "function" in tool or not isinstance(tool.get("name"), str):
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _to_call(call: Any, place: str) -> dict[str, Any]:
    function = call["function"] if isinstance(call, dict) and isinstance(call.get("function"), dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"`{place}` is a function call without a name")
    is_bare = function is call
    # Mistral's models write a call's id beside its name; templates look for it outside.
    outside = {key: value for key, value in call.items() if value is not None and (not is_bare or key == "id")}
    inside = {key: value for key, value in function.items() if key not in ("parameters", *(["id"] if is_bare else []))}
    return {"type": "function", **outside, "function": {**inside, "arguments": _arguments(function, place)}}


def _arguments(function: dict[str, Any], place: str) -> dict[str, Any]:
    # Llama's calls have `parameters`.
    arguments = function.get("arguments", function.get("parameters"))
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RowError(f"`{place}`: the arguments of {function['name']} are not valid JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise RowError(f"`{place}`: the arguments of {function['name']} are not an object")
    return arguments


def _is_alike(function: dict[str, Any]) -> bool:
    """Whether Python writes the arguments as JSON does."""
    return str(function["arguments"]) == json.dumps(function["arguments"], ensure_ascii=False)
