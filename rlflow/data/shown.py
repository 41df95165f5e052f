"""What a conversation says and its chat template leaves out."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

from rlflow.data.errors import RowError
from rlflow.data.messages import REASONING_KEYS
from rlflow.data.turns import MARKER, Render
from rlflow.types import Message

TAG = re.compile(r"(</?think>)")
THOUGHT = re.compile(r"(\s*<think>)?((?:(?!<think>).)*?)(</think>)(.*)", re.DOTALL)
"""A thought at the beginning of an answer. What a model wrote behind a prompt that opens it has no opening tag."""
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
    marker: str
    """No other message's."""
    marked: Message
    """The message with the marker in its place."""
    is_thought: bool


def left_out(
    messages: Sequence[Message],
    trained: Collection[int],
    render: Render,
    last_said: str = "",
    read: Callable[[], Collection[str]] = tuple,
) -> list[str]:
    """The thoughts of turns that are not trained and that the template leaves out, a sentence each.

    Args:
        messages: The conversation.
        trained: Indices of the turns that are trained.
        render: Renders messages.
        last_said: What the last turn is trained to say, where that is not what the template has.
        read: The variables that the template reads.

    Raises:
        RowError: The template leaves out what somebody says, or a thought that is to be trained.
    """
    notes = []
    for piece in _hidden(messages, render):
        place = f"messages[{piece.index}].{piece.field}"
        is_last = piece.index == len(messages) - 1
        if is_last and piece.is_thought and last_said and with_thought(messages[-1], last_said) == last_said:
            continue
        if not piece.is_thought:
            role = messages[piece.index]["role"]
            raise RowError(f"the chat template leaves out {place}, what the {role} says")
        if piece.index in trained:
            switch = _switch_for(piece, messages, render, read())
            keep = f"model.chat_template_kwargs: {switch} keeps it, " if switch else ""
            if not switch and piece.field in REASONING_KEYS:
                keep = "`reasoning: inline` in its source writes it as <think> text, "
            last_alone = ", and data.loss_on: last_assistant trains the last turn alone"
            raise RowError(
                f"the chat template leaves out {place}, a thought that is to be trained: {keep}model.chat_template "
                f"sets another template{'' if is_last else last_alone}"
            )
        notes.append(f"the chat template leaves out {place}, a thought of a turn that is not trained")
    return notes


def with_thought(message: Message, rendered: str) -> str:
    """What a turn says as its template rendered it, with the thought in front that the template took out."""
    thought = THOUGHT.match(message["content"])
    if thought is not None:
        opening, said, closing, answer = thought.groups()
        shown = said.strip() in _before(answer, rendered)
        return rendered if shown else f"{(opening or '<think>').lstrip()}{said}{closing}{rendered}"
    said = next((message[key].strip() for key in REASONING_KEYS if key in message), "")
    return rendered if said in _before(message["content"], rendered) else f"<think>\n{said}\n</think>\n\n{rendered}"


def _before(answer: str, rendered: str) -> str:
    """What a turn says before its answer, which may repeat the thought."""
    return rendered.rstrip().removesuffix(answer.strip())


def _hidden(messages: Sequence[Message], render: Render) -> Iterator[Piece]:
    """The texts of a conversation that are not shown.

    A text that is found in the rendering may be another's, or the template's own: markers are looked for in its place.
    They stand for one text of every message at a time, and where one is missing for that text alone, because templates
    look at what others say.
    """
    pieces = [[piece for piece in _texts(index, message) if piece.text] for index, message in enumerate(messages)]
    for turn in itertools.zip_longest(*pieces):
        marked = [message if piece is None else piece.marked for piece, message in zip(turn, messages, strict=True)]
        try:
            rendered = render(marked)
        except RowError:
            rendered = ""
        yield from (
            piece
            for piece in turn
            if piece is not None and piece.marker not in rendered and _is_hidden(piece, messages, render)
        )


def _is_hidden(piece: Piece, messages: Sequence[Message], render: Render) -> bool:
    """Of a template that refuses markers (it may want JSON there) nothing can be told."""
    try:
        return piece.marker not in render(_alone(piece, messages))
    except RowError:
        return False


def _alone(piece: Piece, messages: Sequence[Message]) -> list[Message]:
    return [*messages[: piece.index], piece.marked, *messages[piece.index + 1 :]]


def _switch_for(piece: Piece, messages: Sequence[Message], render: Render, read: Collection[str]) -> str | None:
    """The setting with which the template shows a thought that it leaves out otherwise."""
    for name, value in THOUGHT_SWITCHES.items():
        if name in read and piece.marker in render(_alone(piece, messages), **{name: value}):
            return f"{{{name}: {json.dumps(value)}}}"
    return None


def _texts(index: int, message: Message) -> Iterator[Piece]:
    """The texts of a message. Templates cut answers at the tags of thoughts, so each side of a tag is one."""
    parts = TAG.split(message["content"]) if message["role"] == "assistant" else [message["content"]]
    marker = f"{MARKER}{index}{MARKER}"

    def piece(field: str, text: str, before: str = "", behind: str = "", *, is_thought: bool = False) -> Piece:
        return Piece(index, field, text.strip(), marker, {**message, field: f"{before}{marker}{behind}"}, is_thought)

    for at in range(0, len(parts), 2):
        is_thought = parts[at + 1 : at + 2] == ["</think>"]
        yield piece("content", parts[at], "".join(parts[:at]), "".join(parts[at + 1 :]), is_thought=is_thought)
    for key in REASONING_KEYS:
        if key in message:
            yield piece(key, message[key], is_thought=True)
