"""Function calls read by a tool parser of vLLM's, whose classes are made for the tools of a request."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rlflow.data.calls import described

_MOST_PARSERS = 64
"""Rows have tools of their own; a parser is kept for so many lists of them."""


class VllmCalls:
    def __init__(self, name: str, tokenizer: Any) -> None:
        """
        Raises:
            ValueError: vLLM has no parser of that name, or is not installed.
        """
        try:
            from vllm.tool_parsers import ToolParserManager
        except ImportError as error:
            raise ValueError(
                f"environment.call_parser: {name} is a parser of vLLM's, which is not installed: install it, or set "
                "auto"
            ) from error
        try:
            self._parser_class = ToolParserManager.get_tool_parser(name)
        except KeyError as error:
            raise ValueError(f"environment.call_parser: vLLM has no parser {name}: {error}") from error
        self._tokenizer = tokenizer
        self._made: dict[str, tuple[Any, Any]] = {}
        self._parser_of([])

    def read(self, text: str, tools: Sequence[Any]) -> tuple[str, list[dict[str, Any]]]:
        """What a text says beside its calls, and these, their arguments of the types that the tools' schemas say.

        Their ids are left out: those that vLLM draws at random are no part of what the policy wrote.
        """
        parser, request = self._parser_of(tools)
        read = parser.extract_tool_calls(text, request)
        calls = [call.model_dump(exclude={"id"}) for call in read.tool_calls]
        return read.content or "", calls

    def _parser_of(self, tools: Sequence[Any]) -> tuple[Any, Any]:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        known = json.dumps(list(tools), sort_keys=True)
        if known not in self._made:
            if len(self._made) >= _MOST_PARSERS:
                self._made.clear()
            # A schema of what a function returns is transformers', and no field of OpenAI's.
            request = ChatCompletionRequest.model_validate(
                {"messages": [], "model": "", "tools": [_without_return(described(tool)) for tool in tools] or None}
            )
            self._made[known] = self._parser_class(self._tokenizer, [*(request.tools or ())]), request
        return self._made[known]


def _without_return(tool: dict[str, Any]) -> dict[str, Any]:
    function = {key: value for key, value in tool["function"].items() if key != "return"}
    return {"type": "function", "function": function}
