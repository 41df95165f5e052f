"""The ids of function calls, which some chat templates want: Mistral's refuse a call without one of nine characters."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from rlflow.types import Message

_ID = re.compile(r"[A-Za-z0-9]{9}")
"""What every template takes."""


def with_ids(messages: Sequence[Message]) -> list[Message]:
    """The messages, each call and each result with an id of nine letters and digits: its own, one made of its own, or
    one by its place. Ids of a call and its result that were equal, or missing, are equal."""
    identified: list[Message] = []
    caller, ids, num_results = 0, [], 0
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            calls = message.get("tool_calls", ())
            caller, num_results = index, 0
            ids = [_made_of(call.get("id"), index, number) for number, call in enumerate(calls)]
            identified_calls = [{**call, "id": id_} for call, id_ in zip(calls, ids, strict=True)]
            message = {**message, "tool_calls": identified_calls} if calls else message
        elif message["role"] == "tool":
            own = message.get("tool_call_id")
            id_ = ids[num_results] if own is None and num_results < len(ids) else _made_of(own, caller, num_results)
            message, num_results = {**message, "tool_call_id": id_}, num_results + 1
        identified.append(message)
    return identified


def _made_of(own: Any, caller: int, number: int) -> str:
    """
    Args:
        own: The id that there is, of any type.
        caller: Which message makes the call.
        number: Which of its calls it is.
    """
    if not isinstance(own, str):
        return f"{caller % 10**6:06d}{number % 1000:03d}"
    return own if _ID.fullmatch(own) else hashlib.blake2b(own.encode(errors="replace")).hexdigest()[:9]
