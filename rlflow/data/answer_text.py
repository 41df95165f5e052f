"""Tokens to text while they come: whole characters, and where a stop string ends them, whatever tokens it lies in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for the bytes of a character that has not all of them."""
CONTEXT_TOKENS = 8
"""Of a prompt, before a text that goes on from it: whether a space begins the next token depends on them."""


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
        keep = max((overlap(self._held, stop) for stop in self._stop), default=0)
        end = len(self._held) - keep
        shown, self._held = self._held[:end], self._held[end:]
        return shown

    def _decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False) if ids else ""


def overlap(text: str, word: str) -> int:
    """How many characters at the end of ``text`` are the beginning of ``word``, and not all of it."""
    return next((size for size in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:size])), 0)
