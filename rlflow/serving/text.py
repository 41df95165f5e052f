"""Tokens to text while they come: whole characters, no special tokens, nothing of a stop string; thoughts apart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for the bytes of a character that has not all of them."""
CONTEXT_TOKENS = 8
"""Of a prompt, before a text that goes on from it: whether a space begins the next token depends on them."""
TAGS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
}
"""What begins a thought, and what ends it."""


def hidden_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """The special tokens, which nobody is shown: all but those that begin and end thoughts."""
    shown = {*TAGS, *TAGS.values()}
    return frozenset(
        id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special and token.content not in shown
    )


class AnswerText:
    """The text of a completion.

    A token's text depends on the one before it (sentencepiece takes the space from the first of a text, a character
    may be spread over several), so what is new is what decoding a few tokens gives more than decoding those before.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        hidden: frozenset[int],
        stop: Sequence[str] = (),
        context: Iterable[int] = (),
    ) -> None:
        """
        Args:
            hidden: Ids of tokens that are not shown.
            stop: The text ends before the first of these.
            context: Ids of the prompt, where the text goes on from it.
        """
        self._backend, self._hidden, self._stop = tokenizer.backend_tokenizer, hidden, tuple(stop)
        self._ids = [id_ for id_ in list(context)[-CONTEXT_TOKENS:] if id_ not in hidden]
        self._shown_until, self._known = len(self._ids), self._decode(self._ids)
        """How many of the ids are shown, and their text."""
        self._held = ""
        """Text with which a stop string may begin."""
        self.is_stopped = False
        """A stop string has come."""

    def push(self, token_ids: Iterable[int]) -> str:
        """Takes tokens. Returns the text that can be shown now; what comes behind a stop string is left out."""
        return "".join(self._push(int(id_)) for id_ in token_ids)

    def finish(self) -> str:
        """Returns the text that was held back. A character that lacks bytes is left out: it will never have them."""
        if self.is_stopped:
            return ""
        shown = self._show(self._decode(self._ids)[len(self._known) :].rstrip(UNFINISHED))
        self._ids, self._known = [], ""
        held, self._held = self._held, ""
        return shown if self.is_stopped else shown + held

    def _push(self, token_id: int) -> str:
        if self.is_stopped or token_id in self._hidden:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith(UNFINISHED):
            return ""
        new = text[len(self._known) :]
        del self._ids[: self._shown_until]
        self._shown_until, self._known = len(self._ids), self._decode(self._ids)
        return self._show(new)

    def _show(self, new: str) -> str:
        """Text up to a stop string, or to where one may begin."""
        self._held += new
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            shown, self._held, self.is_stopped = self._held[: min(places)], "", True
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        end = len(self._held) - keep
        shown, self._held = self._held[:end], self._held[end:]
        return shown

    def _decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False) if ids else ""


class Thoughts:
    """Parts a text that comes in pieces into thoughts, their tags with them, and what is said."""

    _opening = re.compile("|".join(map(re.escape, TAGS)))

    def __init__(self, opened: str = "") -> None:
        """Args: opened: The tag that the prompt ends with, where the text begins within a thought."""
        self._closing = TAGS.get(opened.strip())
        """What ends the thought that is under way."""
        self._held = ""

    def push(self, text: str) -> Iterator[tuple[str, bool]]:
        """The text so far, and of each piece whether it is thought; what may be the beginning of a tag is kept."""
        self._held += text
        while True:
            if self._closing is not None:
                place = self._held.find(self._closing)
                if place < 0:
                    break
                end = place + len(self._closing)
                yield self._held[:end], True
                self._held, self._closing = self._held[end:], None
            else:
                found = self._opening.search(self._held)
                if found is None:
                    break
                if found.start():
                    yield self._held[: found.start()], False
                self._held, self._closing = self._held[found.start() :], TAGS[found[0]]
        tags = TAGS if self._closing is None else (self._closing,)
        end = len(self._held) - max(_overlap(self._held, tag) for tag in tags)
        if end:
            yield self._held[:end], self._closing is not None
        self._held = self._held[end:]

    def finish(self) -> Iterator[tuple[str, bool]]:
        """What was kept."""
        if self._held:
            yield self._held, self._closing is not None
        self._held = ""


def _overlap(text: str, word: str) -> int:
    """How many characters at the end of ``text`` are the beginning of ``word``, and not all of it."""
    return next((size for size in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:size])), 0)
