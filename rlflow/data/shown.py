"""What a conversation says and its chat template leaves out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

from rlflow.data.errors import RowError
from rlflow.data.messages import REASONING_KEYS
from rlflow.data.turns import MARKER, Render
from rlflow.types import Message

THOUGHT = re.compile(r"(\s*<think>)(.*?)(</think>)(.*)", re.DOTALL)
THOUGHT_SWITCHES: dict[str, Any] = {
    "preserve_thinking": True,
    "keep_thinking": True,
    "clear_thinking": False,
    "truncate_history_thinking": False,
    "enable_thinking": True,
    "thinking": True,
}
"""Variables by which templates keep the thoughts that they leave out otherwise, each with the value that keeps them."""


class Piece(NamedTuple):
    """A text within a message."""

    index: int
    field: str
    text: str
    """Without the space around it."""
    marked: Message
    """The message with the marker in its place."""
    is_thought: bool


def left_out(
    text: str,
    messages: Sequence[Message],
    trained: Collection[int],
    render: Render,
    switch_for: Callable[[str], str | None],
) -> list[str]:
    """The thoughts of turns that are not trained and that the template leaves out, a sentence each.

    Args:
        text: What the messages are rendered to.
        messages: The conversation.
        trained: Indices of the turns that are trained.
        render: Renders other messages as ``text`` was rendered.
        switch_for: The setting with which the template shows a thought, if there is one.

    Raises:
        RowError: The template leaves out what somebody says, or a thought that is to be trained.
    """
    notes = []
    for piece in _pieces(messages):
        if _is_in(piece.text, text) or MARKER in render(_with_marker(messages, piece)):
            continue
        place = f"messages[{piece.index}].{piece.field}"
        if not piece.is_thought:
            role = messages[piece.index]["role"]
            raise RowError(f"the chat template leaves out {place}, what the {role} says")
        if piece.index in trained:
            switch = switch_for(piece.text)
            keep = f"model.chat_template_kwargs: {switch} keeps it, " if switch else ""
            last_alone = ", and data.loss_on: last_assistant trains the last turn alone"
            raise RowError(
                f"the chat template leaves out {place}, a thought that is to be trained: {keep}model.chat_template "
                f"sets another template{last_alone if piece.index < len(messages) - 1 else ''}"
            )
        notes.append(f"the chat template leaves out {place}, a thought of a turn that is not trained")
    return notes


def with_thought(message: Message, rendered: str) -> str:
    """What a turn says as its template rendered it, with the thought in front that the template took out."""
    thought = THOUGHT.match(message["content"])
    if thought is not None:
        opening, said, closing, _ = thought.groups()
        return rendered if said.strip() in rendered else f"{opening.lstrip()}{said}{closing}{rendered}"
    said = next((message[key].strip() for key in REASONING_KEYS if key in message), "")
    return rendered if said in rendered else f"<think>\n{said}\n</think>\n\n{rendered}"


def _pieces(messages: Sequence[Message]) -> Iterator[Piece]:
    """The texts of a conversation that are not empty."""
    for index, message in enumerate(messages):
        for field, text, marked, is_thought in _texts(message):
            if text.strip():
                yield Piece(index, field, text.strip(), marked, is_thought)


def _texts(message: Message) -> Iterator[tuple[str, str, Message, bool]]:
    content = message["content"]
    thought = THOUGHT.match(content) if message["role"] == "assistant" else None
    if thought is None:
        yield "content", content, {**message, "content": MARKER}, False
    else:
        before, said, closing, answer = thought.groups()
        yield "content", said, {**message, "content": f"{before}{MARKER}{closing}{answer}"}, True
        yield "content", answer, {**message, "content": f"{before}{said}{closing}{MARKER}"}, False
    for key in REASONING_KEYS:
        if key in message:
            yield key, message[key], {**message, key: MARKER}, True


def _is_in(piece: str, text: str) -> bool:
    """As it is, or as JSON text."""
    return piece in text or any(json.dumps(piece, ensure_ascii=ascii)[1:-1] in text for ascii in (True, False))


def _with_marker(messages: Sequence[Message], piece: Piece) -> list[Message]:
    return [*messages[: piece.index], piece.marked, *messages[piece.index + 1 :]]
