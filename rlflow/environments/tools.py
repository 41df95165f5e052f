"""The built-in environment: functions that the policy may call. It is over when the policy calls none."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlflow.environments.protocol import EnvironmentFault, Reply
from rlflow.types import Message

MOST_CHARACTERS = 65_536
"""Of a result: longer ones are cut, and say so."""


class ToolEnvironment:
    def __init__(self, functions: Sequence[Callable[..., Any]]) -> None:
        self.tools = list(functions)
        self._by_name = {function.__name__: function for function in functions}

    def reset(self, row: Mapping[str, Any]) -> None:
        """The row's messages stand as they are."""

    async def step(self, message: Message) -> Reply:
        """Does all calls of a message, those of coroutine functions side by side; their errors are results as well."""
        calls = message.get("tool_calls", ())
        if not calls:
            return Reply(done=True)
        results = await asyncio.gather(*(call_tool(self._by_name, call["function"]) for call in calls))
        messages = [result_of(call, text) for call, (text, _) in zip(calls, results, strict=True)]
        return Reply(messages, counts={"tool_errors": sum(not is_good for _, is_good in results)})


async def call_tool(functions: Mapping[str, Callable[..., Any]], call: Mapping[str, Any]) -> tuple[str, bool]:
    """What a call gives, as text for the policy, and whether it went well."""
    name, arguments = call["name"], call["arguments"]
    if name not in functions:
        return f"Error: there is no tool {name!r}; there are {', '.join(functions) or 'none'}", False
    function = functions[name]
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        return f"Error: {name} was called with the wrong arguments: {error}", False
    try:
        result = function(**arguments)
        if inspect.isawaitable(result):
            result = await result
        refuse_picture(result, name)
    except EnvironmentFault:
        raise
    # The user's code: the policy is told what it raised.
    except Exception as error:
        return bounded(f"Error: {type(error).__name__}: {error}"), False
    return bounded(as_text(result)), True


def result_of(call: Mapping[str, Any], text: str) -> Message:
    """The message that answers a call."""
    message: Message = {"role": "tool", "name": call["function"]["name"], "content": text}
    return {**message, "tool_call_id": call["id"]} if isinstance(call.get("id"), str) else message


def refuse_picture(result: Any, name: str) -> None:
    """
    Raises:
        EnvironmentFault: A tool returned a picture, of PIL or as an encoded file, alone or in a list.
    """
    for one in result if isinstance(result, list | tuple) else [result]:
        is_file = isinstance(one, bytes) and one.startswith((b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8"))
        if is_file or any(base.__module__ == "PIL.Image" for base in type(one).__mro__):
            raise EnvironmentFault(
                f"the tool {name} returned a picture: what tools say is text, as rollouts travel without pictures of "
                "their own. Return in words what is to be seen"
            )


def as_text(result: Any) -> str:
    """Text as it is, anything else as JSON where that can hold it, or as Python prints it."""
    if isinstance(result, str):
        return result
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(result)


def bounded(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]}... (cut: it has {len(text):,} characters)"


def described(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """The JSON schema of each tool, in OpenAI's form: of a function by its type hints and docstring.

    Raises:
        EnvironmentFault: A function has none of them, or two have one name.
    """
    schemas = []
    for tool in tools:
        if isinstance(tool, Mapping):
            schemas.append(dict(tool))
            continue
        from transformers.utils.chat_template_utils import (
            DocstringParsingException,
            TypeHintParsingException,
            get_json_schema,
        )

        try:
            schemas.append(get_json_schema(tool))
        except (DocstringParsingException, TypeHintParsingException, ValueError) as error:
            raise EnvironmentFault(
                f"the tool {tool.__name__} cannot be described to the policy: {error}. Give it type hints, and a "
                "docstring with a line for every argument under Args:"
            ) from error
    names = [schema.get("function", schema).get("name") for schema in schemas]
    if repeated := sorted({str(name) for name in names if names.count(name) > 1}):
        raise EnvironmentFault(f"two tools are called {', '.join(repeated)}: rename one")
    return schemas
