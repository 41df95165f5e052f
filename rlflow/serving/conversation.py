"""A conversation with a policy: what was said, what it reads of it, and its answer as it comes."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlflow.data.answer_text import AnswerText
from rlflow.data.errors import RowError
from rlflow.data.formats import with_system
from rlflow.data.image_rows import place_images, with_images
from rlflow.data.messages import GivenImage
from rlflow.data.prompts import opened_tag
from rlflow.driver.errors import RunError
from rlflow.serving.models import ServedModel
from rlflow.serving.sampling import Sampling
from rlflow.serving.streams import Ask, Piece, Streams
from rlflow.types import Message

SILENCE_S = 600.0
"""An engine that writes no token for so long does not work any more."""


class TooLongError(ValueError):
    """A prompt leaves no room for an answer in the model's context."""


@dataclass(frozen=True, slots=True)
class AskedPrompt:
    """What the policy goes on from."""

    token_ids: np.ndarray
    """int32 [P]."""
    opened: str = ""
    """A tag that begins a thought, at its end."""
    images: tuple[bytes, ...] = ()
    """The pictures in ``token_ids``, encoded."""
    engine_token_ids: np.ndarray | None = None
    """int32: ``token_ids`` with one placeholder a picture; None without pictures."""


def render(model: ServedModel, messages: Sequence[Message], images: Sequence[bytes] = ()) -> AskedPrompt:
    """
    Args:
        messages: Each with the number of its pictures.
        images: Of the messages, encoded, in their order.

    Raises:
        RowError: The chat template refuses the messages, or leaves out what they say.
    """
    rendered = with_images(model.chat.render_prompt(messages), messages, images, model.chat)
    (token_ids,), opened = model.chat.encode([rendered]), opened_tag(rendered.text)
    if model.vision is None or not rendered.images:
        return AskedPrompt(token_ids, opened)
    return AskedPrompt(model.vision.expand(token_ids, rendered.images), opened, rendered.images, token_ids)


def encode_text(model: ServedModel, text: str) -> AskedPrompt:
    """A text that is to be gone on from, behind bos where the tokenizer has that habit."""
    rendered = model.chat.render_text(text, complete=False)
    return AskedPrompt(model.chat.encode([rendered])[0], opened_tag(text))


def room_behind(prompt: np.ndarray, model: ServedModel) -> int:
    """Tokens that the context has left.

    Raises:
        TooLongError: There are none.
    """
    room = model.context - len(prompt)
    if not len(prompt):
        raise TooLongError("the prompt has no tokens")
    if room < 1:
        raise TooLongError(
            f"the prompt has {len(prompt):,} tokens, and the model reads {model.context:,} with its answer"
        )
    return room


def check_characters(text: str) -> None:
    """Raises RowError where bytes that are no UTF-8 have come as half surrogate pairs: no tokenizer reads them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 20) : error.start]
        raise RowError(f"what follows {near!r} is no UTF-8 text") from error


class Answer:
    """One answer on its way: iterate over its text, or cancel it."""

    def __init__(
        self, model: ServedModel, streams: Streams, name: str, prompt: AskedPrompt, sampling: Sampling, seed: int
    ) -> None:
        params = sampling.params(model.stop_token_ids, room_behind(prompt.token_ids, model))
        self.prompt, self.limit = prompt, params.max_new_tokens
        self.text, self.num_tokens = "", 0
        self.finish_reason = ""
        self._streams = streams
        self._decoder = AnswerText(model.tokenizer, model.hidden, sampling.stop)
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        shown = (prompt.images, prompt.engine_token_ids)
        (self._id,) = streams.submit([Ask(name, prompt.token_ids, seed, params, self._pieces.put, *shown)])

    def __iter__(self) -> Iterator[str]:
        """Pieces of the text.

        Raises:
            RunError: The engine failed, or says nothing for too long.
        """
        while not self.finish_reason:
            try:
                piece = self._pieces.get(timeout=SILENCE_S)
            except queue.Empty:
                raise RunError(f"the engine has written nothing for {SILENCE_S:g} s") from None
            if piece.finish_reason == "error":
                raise RunError(f"the engine failed: {piece.error}")
            self.num_tokens += len(piece.written.token_ids)
            new = self._decoder.push(piece.written.token_ids)
            if self._decoder.is_stopped:
                self.cancel()
                self.finish_reason = "stop"
            elif piece.finish_reason is not None:
                new += self._decoder.finish()
                self.finish_reason = piece.finish_reason
            self.text += new
            if new:
                yield new

    def cancel(self) -> None:
        """Ends it where it is."""
        self._streams.cancel([self._id])


class Conversation:
    """What was said so far. Without a chat template every text is gone on from alone."""

    def __init__(self, model: ServedModel, system: str | None) -> None:
        self.model, self.system = model, system
        self.clear()

    def clear(self) -> None:
        self.messages: list[Message] = []
        self.images: tuple[bytes, ...] = ()
        """Of the messages."""
        self.shown: list[bytes] = []
        """Pictures that the next message shows."""

    def show(self, path: str) -> None:
        """Has the next message show a picture: where its text has ``<image>``, or else in front of it.

        Raises:
            RowError: The model takes no pictures, or this file is none.
        """
        if self.model.vision is None or not self.model.has_template:
            lacks = "takes text alone" if self.model.vision is None else "has no chat template to show a picture in"
            raise RowError(f"{self.model.source.path} {lacks}")
        self.shown.append(self.model.vision.load(path, Path.cwd()))

    def prompt(self, text: str) -> AskedPrompt:
        """What the policy reads when somebody says ``text`` now; it joins the conversation with its answer.

        Raises:
            RowError: It is no text, the template refuses it, or it has not a place for every picture that it shows.
            TooLongError: The conversation is longer than the model reads.
        """
        check_characters(text)
        if not self.model.has_template:
            asked = encode_text(self.model, text)
        else:
            message, images = self._question(text)
            said: list[Any] = [*self.messages, message]
            asked = render(self.model, with_system(said, self.system or None), (*self.images, *images))
        room_behind(asked.token_ids, self.model)
        return asked

    def add(self, text: str, answer: str, opened: str) -> None:
        """Takes an exchange. What the prompt opened belongs to the answer, which templates cut thoughts from."""
        message, images = self._question(text)
        self.messages += [message, {"role": "assistant", "content": opened + answer}]
        self.images += images
        self.shown = []

    def _question(self, text: str) -> tuple[Message, tuple[bytes, ...]]:
        message: Message = {"role": "user", "content": text}
        if not self.shown:
            # Without pictures the tag is what somebody wrote.
            return message, ()
        given = [GivenImage(f"picture {number}", image) for number, image in enumerate(self.shown, 1)]
        (message,), images = place_images([message], given, self.model.vision, Path.cwd())
        return message, images
