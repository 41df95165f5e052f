"""Overlong prompts, cut so that they stay prompts: bos, system message, role markers and generation prompt remain.

First whole exchanges go, the oldest first; then the middle of the longest message that is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlflow.data.chat import Chat
from rlflow.data.encoding import Encoded
from rlflow.data.errors import RowError
from rlflow.data.turns import MARKER
from rlflow.types import Message


def shorten_prompt(
    chat: Chat, messages: Sequence[Message], tools: list[Any] | None, limit: int
) -> tuple[np.ndarray, list[Message]]:
    """At most ``limit`` tokens (int32 [P]) of a prompt, and the messages that are left.

    Raises:
        RowError: It cannot be cut that far.
    """
    kept = list(messages)
    while True:
        rendered = chat.render_prompt(kept, tools)
        (encoded,) = chat.encode_with_offsets([rendered])
        excess = len(encoded.token_ids) - limit
        if excess <= 0:
            return encoded.token_ids, kept
        later = _without_oldest(kept)
        if later is None:
            return _without_middle(encoded, _longest_content(chat, kept, tools, rendered.text), excess), kept
        kept = later


def shorten_text(token_ids: np.ndarray, limit: int, bos_token_id: Any) -> np.ndarray:
    """Of a plain text's tokens the bos that it begins with, and the last of the others: int32 [``limit``]."""
    num_kept = int(token_ids[0] == bos_token_id)
    return np.concatenate([token_ids[:num_kept], token_ids[len(token_ids) - limit + num_kept :]])


def _without_oldest(messages: Sequence[Message]) -> list[Message] | None:
    """The messages without the first user message and what follows it up to the next one; None without a next one."""
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    return [*messages[: users[0]], *messages[users[1] :]] if len(users) > 1 else None


def _longest_content(chat: Chat, messages: Sequence[Message], tools: list[Any] | None, text: str) -> tuple[int, int]:
    """[start, end) of the longest message that is not the system's, in the text that they are rendered to.

    Raises:
        RowError: The template does not write it as it is.
    """
    sizes = {index: len(message["content"]) for index, message in enumerate(messages) if message["role"] != "system"}
    longest = max(sizes, key=lambda index: sizes[index])
    marked = [*messages]
    marked[longest] = {**messages[longest], "content": MARKER}
    before, _, behind = chat.renderer(tools, generation_prompt=True)(marked).partition(MARKER)
    if not (text.startswith(before) and text.endswith(behind)):
        raise RowError(f"messages[{longest}] cannot be cut: the chat template changes it")
    return len(before), len(text) - len(behind)


def _without_middle(encoded: Encoded, content: tuple[int, int], excess: int) -> np.ndarray:
    """The tokens without ``excess`` of those in the middle of ``content``, or a few more: characters stay whole.

    Raises:
        RowError: There are not so many.
    """
    first, last = encoded.span(*content)
    if last - first <= excess:
        raise RowError(f"{excess:,} tokens too many, and its longest message has {last - first:,}")
    # Where no character is parted.
    inner = np.arange(first + 1, last)
    places = np.array([first, *inner[encoded.starts[inner] == encoded.ends[inner - 1]], last])
    start = places[places <= first + (last - first - excess) // 2][-1]
    end = places[places >= start + excess][0]
    return np.delete(encoded.token_ids, np.s_[start:end])
