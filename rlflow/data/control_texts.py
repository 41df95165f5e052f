"""Text from outside that is written like a control token, such as ``<|im_end|>``.

A tokenizer makes the token of it wherever it stands: what a tool has read on some page could end its own turn and begin
another's. It gets a space behind its first character, so that it is text like any other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlflow.data.messages import parts_of, shown_tags
from rlflow.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ControlTexts:
    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        names = {name for name in names if len(name.strip()) > 1}
        self._pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")

    def broken_up(self, messages: Sequence[Message]) -> tuple[list[Message], int]:
        """The messages with every such text of their contents broken up, and how many there were."""
        broken, number = [], 0
        for message in messages:
            # Where pictures stand, their tags do.
            parts = parts_of(message["content"], shown_tags(message))
            made = [self._broken(part["text"]) if "text" in part else (f"<{part['type']}>", 0) for part in parts]
            found = sum(count for _, count in made)
            broken.append({**message, "content": "".join(text for text, _ in made)} if found else message)
            number += found
        return broken, number

    def _broken(self, text: str) -> tuple[str, int]:
        return self._pattern.subn(lambda token: f"{token[0][0]} {token[0][1:]}", text)
