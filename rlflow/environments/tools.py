"""The built-in environment: functions that the policy may call. It is over when the policy calls none."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlflow.environments.protocol import EnvironmentFault, Reply, told
from rlflow.environments.tool_types import with_types
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
        text = as_text(result)
    except EnvironmentFault:
        raise
    # The user's code, and what it runs for the policy: SystemExit is no Exception. The policy is told what was raised.
    except BaseException as error:
        return bounded(f"Error: {told(error)}"), False
    return bounded(text), True


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
        EnvironmentFault: One is neither, or says too little; or two have one name.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise EnvironmentFault(f"its tools are a {type(tools).__name__}: give a list of functions, or of JSON schemas")
    schemas = [_schema_of(tool) for tool in tools]
    names = [schema.get("function", schema)["name"] for schema in schemas]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise EnvironmentFault(f"two tools are called {', '.join(repeated)}: rename one")
    return schemas


def _schema_of(tool: Any) -> dict[str, Any]:
    if isinstance(tool, Mapping):
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        try:
            written = json.loads(json.dumps(tool))
        except (TypeError, ValueError, RecursionError) as error:
            raise EnvironmentFault(f"the schema of its tool {name} is no JSON: {error}") from error
        if not isinstance(name, str) or not name:
            raise EnvironmentFault(
                f"a tool has no name: {json.dumps(tool):.100}. Write it as {{type: function, function: {{name: ..., "
                "description: ..., parameters: {...}}}"
            )
        return written
    if not inspect.isroutine(tool):
        raise EnvironmentFault(
            f"a tool is {tool!r:.80}: give functions with type hints and a docstring, or JSON schemas"
        )
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        if unnamed := [each.name for each in inspect.signature(tool).parameters.values() if each.kind in by_place]:
            raise ValueError(f"calls give arguments by name, which {unnamed[0]} cannot be (/, * or **)")
        return with_types(get_json_schema(tool), tool)
    # What transformers makes of other people's type hints and docstrings.
    except Exception as error:
        raise EnvironmentFault(
            f"the tool {tool.__name__} cannot be described to the policy: {str(error).rstrip('.!')}. Give it type "
            "hints, and a docstring with a line for every argument under Args:"
        ) from error
