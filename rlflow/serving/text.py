"""What people are shown of an answer: no special tokens; thoughts apart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlflow.data.answer_text import overlap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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
        end = len(self._held) - max(overlap(self._held, tag) for tag in tags)
        if end:
            yield self._held[:end], self._closing is not None
        self._held = self._held[end:]

    def finish(self) -> Iterator[tuple[str, bool]]:
        """What was kept."""
        if self._held:
            yield self._held, self._closing is not None
        self._held = ""
