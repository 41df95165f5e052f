"""Where the assistant's turns are in a rendered conversation, by what the template puts around them.

Nothing is searched for in the text, which may hold anything. The conversation is rendered once more with a marker in
the place of every answer; where its pieces and the answers make up the text, the places are known. A template that
rewrites turns (Qwen3 takes the thoughts of earlier ones out) is asked about one turn after the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from rlflow.data.calls import with_arguments
from rlflow.data.errors import RowError
from rlflow.types import Message

MARKER = "\ue000\ue001\ue000"
"""Stands for an answer while its place in the text is found: private-use characters, which no template changes."""

Render = Callable[..., str]
"""render(messages, generation_prompt=..., **variables): the text of a conversation; without the keyword, as the text
that is looked at was rendered."""


class Turn(NamedTuple):
    """An assistant turn's place, in characters."""

    start: int
    """The end of the generation prompt, which is where the policy starts to write."""
    content: int
    """Where its content begins: behind ``start`` where the template puts something between."""
    end: int
    """The end of what it says; the template's end of turn is behind it."""
    follows_prompt: bool
    """Whether the text before it begins with the prompt that the policy has for this turn."""


def find_turns(
    text: str,
    messages: Sequence[Message],
    wanted: Collection[int],
    render: Render,
    generation_prompt: str,
    special_token: re.Pattern[str],
) -> dict[int, Turn]:
    """The place of every assistant turn that has one, and of all that are ``wanted``.

    Args:
        text: What the messages are rendered to.
        messages: The conversation.
        wanted: Indices of turns that must be found.
        render: Renders other messages.
        generation_prompt: What the template puts behind a question for the policy to go on from.
        special_token: Matches any of the tokenizer's.

    Raises:
        RowError: The template renders a wanted turn so that it cannot be found.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    contents = _find_contents(text, messages, answers, render) if answers else {}
    turns: dict[int, Turn] = {}
    for index in answers:
        found = _find_content(text, messages, index, render) if contents is None else contents[index]
        if found is None and "tool_calls" in messages[index]:
            found = _find_call(text, messages, index, render, special_token)
        if found is None:
            continue
        content, end = found
        if content is not None and generation_prompt and text.endswith(generation_prompt, 0, content):
            turns[index] = Turn(content, content, end, follows_prompt=True)
        else:
            prompt = render(messages[:index], generation_prompt=True) if index else None
            follows = prompt is None or text.startswith(prompt)
            start = len(prompt) if prompt is not None and follows else content
            if start is not None:
                turns[index] = Turn(start, start if content is None else content, end, follows)
    for index in wanted:
        if index not in turns or turns[index].end <= turns[index].start:
            raise RowError(
                f"the chat template leaves messages[{index}] out or changes what is around it, so that its tokens "
                "cannot be told. For SFT, data.loss_on: last_assistant trains the last turn alone"
            )
    return turns


def _find_contents(
    text: str, messages: Sequence[Message], answers: Sequence[int], render: Render
) -> dict[int, tuple[int, int]] | None:
    """[start, end) of what every answer says, where the template writes it as it is or without space around it."""
    try:
        first, *others = render(_mark(messages, answers)).split(MARKER)
    except RowError:
        return None
    if len(others) != len(answers) or not text.startswith(first):
        return None
    places, position = {}, len(first)
    for index, behind in zip(answers, others, strict=True):
        said = messages[index]["content"]
        forms = dict.fromkeys((said, said.strip()))
        length = next((len(form) for form in forms if text.startswith(form + behind, position)), None)
        if not length:
            return None
        places[index] = (position, position + length)
        position += length + len(behind)
    return places if position == len(text) else None


def _find_content(text: str, messages: Sequence[Message], index: int, render: Render) -> tuple[int | None, int] | None:
    """Where one turn's content begins, where that can be told, and where what it says ends."""
    try:
        before, found, behind = render(_mark(messages, {index})).partition(MARKER)
        next_said = _start_of_result(messages, index + 1, render)
    except RowError:
        return None
    end = len(text) - len(behind)
    if not found or not text.endswith(behind) or (next_said is not None and end > next_said):
        return None
    return len(before) if text.startswith(before) else None, end


def _find_call(
    text: str, messages: Sequence[Message], index: int, render: Render, special_token: re.Pattern[str]
) -> tuple[None, int] | None:
    """Where a turn's last call ends, if that is what the turn ends with: gpt-oss' are messages of their own, which
    become others where the turn says something else."""
    (marked,) = with_arguments([messages[index]], lambda _: {MARKER: 1})
    try:
        behind = render([*messages[:index], marked, *messages[index + 1 :]]).rpartition(MARKER)[2]
    except RowError:
        return None
    behind = re.sub(r'\A\\?"\s*:\s*1\s*\}', "", behind)
    found = text.endswith(behind) and special_token.match(behind)
    return (None, len(text) - len(behind)) if found else None


def _start_of_result(messages: Sequence[Message], index: int, render: Render) -> int | None:
    """Where this message begins, if it is a tool's result that the template shows. Gemma 4's puts results into the
    turn that calls, and without the call into a turn of their own."""
    if index == len(messages) or messages[index]["role"] != "tool":
        return None
    marked = [*messages[:index], {**messages[index], "content": MARKER}, *messages[index + 1 :]]
    before, found, _ = render(marked).partition(MARKER)
    return len(before) if found else None


def _mark(messages: Sequence[Message], indices: Collection[int]) -> list[Message]:
    """The messages with the marker as what these assistant turns say."""
    return [
        {"role": "assistant", "content": MARKER} if index in indices else message
        for index, message in enumerate(messages)
    ]
