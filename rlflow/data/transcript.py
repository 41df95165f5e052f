"""An episode as its chat template has it: what stands between two turns, in tokens, and when history is rewritten.

What the policy wrote stays in the stream as it was sampled. What comes behind it is the difference that the template
makes of it: the conversation is rendered with what the policy heard and with a mark in the place of what it said last;
all that is behind that turn's stop token is tokenised on its own and appended; where a stop string ended the turn, the
stop token with it.

A template may write earlier turns otherwise once new messages come: Qwen3's and DeepSeek-R1's take their thoughts out,
gpt-oss ends them with another token. What the policy is to go on from is then no continuation of what it has read: a
new sequence begins, with the whole conversation as the template now has it, none of which is sampled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlflow.data.chat import Chat
from rlflow.data.encoding import Rendered
from rlflow.data.errors import RowError
from rlflow.data.messages import REASONING_KEYS
from rlflow.data.prompts import opened_tag
from rlflow.types import Completion, Message

_SAID, _HEARD = "\ue000{}\ue001", "\ue002\ue003\ue002"
"""Stand for what was said and heard while places in the text are found: private-use characters, which no template
changes."""
THOUGHT_ENDS = re.compile(r"</(?:think|thinking|thought|reasoning|seed:think)>|\[/THINK\]")


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens in a row that are all sampled or all not."""

    token_ids: np.ndarray
    completion: Completion | None = None


class Transcript:
    """Begins with a prompt; `wrote` and `heard` take turns."""

    def __init__(
        self,
        chat: Chat,
        stop_token_ids: Sequence[int],
        messages: Sequence[Message],
        tools: Sequence[Any],
        token_ids: np.ndarray,
        images: tuple[bytes, ...] = (),
        engine_token_ids: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            stop_token_ids: What ends a turn.
            messages: What the prompt was rendered from.
            token_ids: int32 [P]: the prompt.
            images: Its pictures.
            engine_token_ids: The prompt with one placeholder a picture; None without pictures.
        """
        self.images = images
        self._engine_token_ids = engine_token_ids
        """int32: what the last sequence begins with, as engines are given it; None without pictures."""
        self.chat, self.messages, self.tools = chat, list(messages), list(tools)
        self._stops = {chat.tokenizer.convert_ids_to_tokens(id_): id_ for id_ in stop_token_ids}
        stops = "|".join(map(re.escape, sorted((str(text) for text in self._stops), key=len, reverse=True)))
        self._stop = re.compile(stops or r"(?!)")
        self._render = chat.renderer(self.tools or None, generation_prompt=True)
        self.text = self._render(self.messages)
        """What the template makes of the messages, up to where the policy writes."""
        self._last_stop: int | None = None
        self._sequences: list[list[_Piece]] = [[_Piece(np.asarray(token_ids, dtype=np.int32))]]

    @property
    def opened(self) -> str:
        """A tag such as ``<think>`` that the policy goes on inside."""
        return opened_tag(self.text)

    @property
    def token_ids(self) -> np.ndarray:
        """int32: what the policy goes on from."""
        return np.concatenate([piece.token_ids for piece in self._sequences[-1]])

    @property
    def engine_token_ids(self) -> np.ndarray | None:
        """int32: ``token_ids`` with one placeholder a picture; None without pictures."""
        if self._engine_token_ids is None:
            return None
        return np.concatenate([self._engine_token_ids, *(piece.token_ids for piece in self._sequences[-1][1:])])

    def refusal(self, message: Message) -> str | None:
        """Why the template refuses what the policy calls, whoever answers it; None where it calls nothing that is
        refused."""
        calls = message.get("tool_calls", ())
        results = [{"role": "tool", "name": call["function"]["name"], "content": "1"} for call in calls]
        refusal = None
        for answers in (results, [{"role": "user", "content": "1"}]) if calls else ():
            try:
                self._render([*self.messages, message, *answers])
            except RowError as error:
                refusal = refusal or str(error)
            else:
                return None
        return refusal

    def wrote(self, completion: Completion, message: Message) -> None:
        """Takes a turn of the policy: its tokens, and the message that they are."""
        self._sequences[-1].append(_Piece(completion.token_ids, completion))
        last = int(completion.token_ids[-1])
        self._last_stop = last if last in self._stops.values() else None
        self.messages.append(message)

    def heard(self, messages: Sequence[Message]) -> int:
        """Takes what comes behind a turn of the policy. Returns how many tokens the next turn has before it that the
        last one had not.

        Raises:
            RowError: The chat template refuses them.
        """
        conversation = [*self.messages, *messages]
        text = self.chat.check_characters(self._render(conversation))
        between = self._behind_unended(text) if self._last_stop is None else self._between(messages)
        if between is not None:
            self._require_places(between, 0)
            self._sequences[-1].append(_Piece(between))
            added = len(between)
        else:
            token_ids = self.chat.encode([Rendered(text)])[0]
            self._require_places(token_ids, len(self.images))
            if self.images:
                assert self.chat.vision is not None
                self._engine_token_ids = token_ids
                token_ids = self.chat.vision.expand(token_ids, self.images)
            added = max(0, len(token_ids) - len(self.token_ids))
            self._sequences.append([_Piece(token_ids)])
        self.messages, self.text = conversation, text
        return added

    def _require_places(self, token_ids: np.ndarray, number: int) -> None:
        """
        Raises:
            RowError: What was said has the token that stands for a picture, and there is none.
        """
        vision = self.chat.vision
        if vision is not None and len(found := token_ids[vision.is_placeholder(token_ids)]) != number:
            token = self.chat.tokenizer.convert_ids_to_tokens(int(found[-1]) if len(found) else vision.image_token_id)
            raise RowError(
                f"what was said holds {token}, the place of a picture, {len(found) - number} times too often: write it "
                "otherwise"
            )

    def forget_last(self) -> None:
        """Takes back what was heard last, for which there is no room; the episode ends before it."""
        self._sequences[-1].pop()
        if not self._sequences[-1]:
            self._sequences.pop()

    def _between(self, messages: Sequence[Message]) -> np.ndarray | None:
        """int32: the tokens between what the policy wrote last and what it is to write next; None where the template
        has written anew what is before."""
        said, marks = _marked(self.messages[-1])
        before = [*self.messages[:-1], said]
        text = self._render([*before, *messages])
        to_heard, found, _ = self._render([*before, {**messages[0], "content": _HEARD}, *messages[1:]]).partition(
            _HEARD
        )
        if not found or not text.startswith(to_heard) or not to_heard.startswith(self.before_turn):
            return None
        turn = to_heard[len(self.before_turn) :]
        if any(mark not in turn for mark in marks):
            return None
        stops = list(self._stop.finditer(turn))
        if not stops or self._stops[stops[-1][0]] != self._last_stop:
            return None
        end = len(self.before_turn) + stops[-1].end()
        # With the stop token before it: some swallow white space that follows.
        return self.chat.encode([Rendered(stops[-1][0] + text[end:])])[0][1:]

    def _behind_unended(self, text: str) -> np.ndarray | None:
        """int32: what the template puts behind a turn that a stop string ended, which has no token of an end; None
        where it writes the turn otherwise than the policy has, or ends it with nothing.

        Args:
            text: Of the conversation with what was heard.
        """
        token_ids = self._sequences[-1][-1].token_ids.tolist()
        written = str(
            self.chat.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
        behind = text.removeprefix(self.text + written)
        if behind == text or not self._stop.match(behind.lstrip()):
            return None
        return self.chat.encode([Rendered(behind)])[0]

    @property
    def before_turn(self) -> str:
        """The text before the policy's turn; a thought that the prompt opens is the turn's."""
        return self.text[: len(self.text) - len(self.opened)]

    def stream(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[int, ...]]:
        """All sequences end to end: token ids int32 [T], which were sampled bool [T], logprobs float32 [T], versions
        int32 [T] (0 and -1 where none was sampled), and where each sequence begins."""
        pieces = [piece for sequence in self._sequences for piece in sequence]
        lengths = [sum(len(piece.token_ids) for piece in sequence) for sequence in self._sequences]
        is_sampled = [np.full(len(piece.token_ids), piece.completion is not None) for piece in pieces]
        logprobs = [
            np.zeros(len(piece.token_ids), np.float32) if piece.completion is None else piece.completion.logprobs
            for piece in pieces
        ]
        versions = [
            np.full(len(piece.token_ids), -1, np.int32) if piece.completion is None else piece.completion.versions
            for piece in pieces
        ]
        return (
            np.concatenate([piece.token_ids for piece in pieces]).astype(np.int32, copy=False),
            np.concatenate(is_sampled),
            np.concatenate(logprobs),
            np.concatenate(versions),
            tuple(np.cumsum([0, *lengths[:-1]]).tolist()),
        )


def _marked(message: Message) -> tuple[Message, list[str]]:
    """The message with marks for what it says and thinks, and the marks; its calls stay, as templates look at them."""
    marked, marks = dict(message), []

    def mark() -> str:
        marks.append(_SAID.format(len(marks)))
        return marks[-1]

    for key in REASONING_KEYS:
        if message.get(key):
            marked[key] = mark()
    content = message["content"]
    thought = list(THOUGHT_ENDS.finditer(content))
    if thought:
        tag = thought[-1][0]
        opening = tag.replace("/", "")
        inside = mark() if content[: thought[-1].start()].replace(opening, "").strip() else ""
        behind = mark() if content[thought[-1].end() :].strip() else ""
        marked["content"] = f"{opening}\n{inside}\n{tag}\n\n{behind}"
        # An empty thought has nothing to mark: its tag must stay.
        marks += [] if inside else [tag]
    elif content.strip():
        marked["content"] = mark()
    return marked, marks
