"""Thoughts that a message keeps apart from what it says, under the key by which its chat template reads them.

Qwen3's and GLM's templates read ``reasoning_content``, gpt-oss' reads ``thinking``; data has any of them, and
``reasoning``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlflow.data.messages import REASONING_KEYS
from rlflow.types import Message


def keys_read(template: str) -> tuple[str, ...]:
    """The keys of thoughts that a template reads of a message."""
    return tuple(key for key in REASONING_KEYS if re.search(rf"""\.{key}\b|['"]{key}['"]""", template))


def under_read_keys(messages: Sequence[Message], keys: Sequence[str]) -> list[Message]:
    """The messages, each with its thought under the first of ``keys`` where it has it under none of them."""
    return [_under(message, keys) for message in messages]


def _under(message: Message, keys: Sequence[str]) -> Message:
    given = next((key for key in REASONING_KEYS if message.get(key)), None)
    if given is None or not keys or any(message.get(key) for key in keys):
        return message
    return {**{key: value for key, value in message.items() if key != given}, keys[0]: message[given]}
