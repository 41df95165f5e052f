"""Thoughts that a message keeps apart from what it says, under the key by which its chat template reads them.

Qwen3's and GLM's templates read ``reasoning_content``, gpt-oss' reads ``thinking``; data has any of them, and
``reasoning``. Of a template that reads none of them (Qwen2.5's, Llama 3's) a source may have its thoughts in the text.
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


def in_text(messages: Sequence[Message]) -> list[Message]:
    """The messages, each assistant's thought in front of what it says, as Qwen3 and DeepSeek-R1 write theirs; of one
    that has a thought in its text as well, it stays where it is."""
    return [_in_text(message) for message in messages]


def _in_text(message: Message) -> Message:
    given = next((key for key in REASONING_KEYS if message.get(key)), None)
    if given is None or message["role"] != "assistant" or "</think>" in message["content"]:
        return message
    others = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    return {**others, "content": f"<think>\n{message[given].strip()}\n</think>\n\n{message['content']}"}


def _under(message: Message, keys: Sequence[str]) -> Message:
    given = next((key for key in REASONING_KEYS if message.get(key)), None)
    if given is None or not keys or any(message.get(key) for key in keys):
        return message
    return {**{key: value for key, value in message.items() if key != given}, keys[0]: message[given]}
