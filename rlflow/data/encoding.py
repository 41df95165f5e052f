"""Rendered text to token ids and the mask of what is trained.

A rollout's prompt is encoded before its answer is known, so no token of an example may reach over the place where an
answer begins. Text is encoded whole; where a token does reach over such a place (``ASSISTANT: `` and ``yes`` of a
byte-level BPE, which knows `` yes``), what is before and behind it is encoded apart, as a rollout has it. So it is
where a tokenizer divides space by what follows (GPT-2's parts two line ends before a word, and joins them at the end).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH = 1024
"""Texts tokenised at a time."""
ANCHOR = "\n"
"""What a continuation is encoded behind where a tokenizer begins every text with a space of its own."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text, the parts of it that are trained, and where the policy starts to write."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    """[start, end) in characters."""
    starts: tuple[int, ...] = ()
    """Where each assistant turn begins, in characters, ascending: no token reaches over one of them."""
    notes: tuple[str, ...] = ()
    """What the chat template leaves out although the row may be used."""
    is_as_prompted: bool = True
    """Whether before every turn that is trained stands what the policy has before it."""
    tokens: tuple[np.ndarray, np.ndarray] | None = None
    """Token ids int32 [T] and which are trained bool [T], where they are known and no text is to be tokenised."""
    images: tuple[bytes, ...] = ()
    """Encoded pictures, in the order of their placeholders in the text."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of a text and the characters that each stands for."""

    token_ids: np.ndarray
    """int32 [T]."""
    starts: np.ndarray
    """int64 [T]."""
    ends: np.ndarray
    """int64 [T]."""

    def span(self, start: int, end: int) -> tuple[int, int]:
        """[first, last) of the tokens that lie in the characters [start, end), whole characters each."""
        inside = np.flatnonzero((self.starts >= start) & (self.ends <= end))
        return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)


class Encoder:
    def __init__(self, tokenizer: PreTrainedTokenizerFast, end_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self._end_ids = np.array(end_ids, dtype=np.int64)
        self._divided: dict[str, bool] = {}

    def encode(self, rendered: Sequence[Rendered]) -> list[np.ndarray]:
        """Token ids of each text, int32 [T]."""
        if any(item.starts for item in rendered):
            return [encoded.token_ids for encoded in self.encode_with_offsets(rendered)]
        return [
            np.array(ids, dtype=np.int32)
            for batch in _batches(rendered)
            for ids in self._tokenize([item.text for item in batch], offsets=False)["input_ids"]
        ]

    def encode_trained(self, rendered: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(token ids int32 [T], loss mask bool [T]) of each.

        A token is trained when all of it lies in a span. Position 0 never is: nothing predicts it.
        """
        return [
            item.tokens or (encoded.token_ids, self._loss_mask(item.spans, encoded))
            for item, encoded in zip(rendered, self.encode_with_offsets(rendered), strict=True)
        ]

    def encode_with_offsets(self, rendered: Sequence[Rendered]) -> Iterator[Encoded]:
        """The tokens of each text with their places in it."""
        for batch in _batches(rendered):
            tokens = self._tokenize([item.text for item in batch], offsets=True)
            for item, ids, offsets in zip(batch, tokens["input_ids"], tokens["offset_mapping"], strict=True):
                whole = _encoded(ids, offsets)
                places = [
                    start
                    for start in item.starts
                    if ((whole.starts < start) & (whole.ends > start)).any()
                    or self._divides(_space_at(item.text, start))
                ]
                yield self._encode_apart(item.text, places) if places else whole

    def _divides(self, space: str) -> bool:
        """Whether this space is other tokens before a word than at the end of a text."""
        if len(space) > 1 and space not in self._divided:
            alone, before = (self._encode_one(f"a{space}{word}").token_ids for word in ("", "b"))
            self._divided[space] = not np.array_equal(before[: len(alone)], alone)
        return self._divided.get(space, False)

    def _encode_apart(self, text: str, places: Sequence[int]) -> Encoded:
        """The pieces of ``text`` between ``places``, each encoded on its own."""
        pieces = []
        for start, end in zip([0, *places], [*places, len(text)], strict=True):
            piece = self._continuation(text[start:end]) if start else self._encode_one(text[:end])
            pieces.append(Encoded(piece.token_ids, piece.starts + start, piece.ends + start))
        return Encoded(
            np.concatenate([piece.token_ids for piece in pieces]),
            np.concatenate([piece.starts for piece in pieces]),
            np.concatenate([piece.ends for piece in pieces]),
        )

    def _continuation(self, text: str) -> Encoded:
        """The tokens of a text that goes on from another, without a space that the tokenizer puts before a text."""
        if self._num_anchor_tokens:
            behind = self._encode_one(ANCHOR + text)
            at = slice(self._num_anchor_tokens, None)
            return Encoded(behind.token_ids[at], behind.starts[at] - len(ANCHOR), behind.ends[at] - len(ANCHOR))
        return self._encode_one(text)

    @cached_property
    def _num_anchor_tokens(self) -> int:
        """How many tokens the anchor is; 0 where a continuation needs none."""
        anchor, alone, behind = (self._encode_one(text).token_ids for text in (ANCHOR, "a", f"{ANCHOR}a"))
        needs_none = np.array_equal(behind[len(anchor) :], alone)
        return 0 if needs_none or not np.array_equal(behind[: len(anchor)], anchor) else len(anchor)

    def _encode_one(self, text: str) -> Encoded:
        tokens = self._tokenize([text], offsets=True)
        return _encoded(tokens["input_ids"][0], tokens["offset_mapping"][0])

    def _loss_mask(self, spans: Sequence[tuple[int, int]], encoded: Encoded) -> np.ndarray:
        """bool [T]: which tokens lie in a span."""
        # An end-of-turn token may be one that swallows the whitespace behind it.
        closes = (encoded.token_ids[:, None] == self._end_ids).any(axis=1)
        mask = np.zeros(len(encoded.token_ids), dtype=bool)
        for start, end in spans:
            mask |= (encoded.starts >= start) & ((encoded.ends <= end) | (closes & (encoded.starts < end)))
        mask[:1] = False
        return mask

    def _tokenize(self, texts: Sequence[str], *, offsets: bool) -> Any:
        return self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )


def _encoded(ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Encoded:
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    # Byte-level tokenizers leave a token's leading space out of its offsets.
    starts = np.minimum(starts, np.concatenate([[0], ends[:-1]]))
    return Encoded(np.array(ids, dtype=np.int32), starts, ends)


def _space_at(text: str, place: int) -> str:
    """The white space that ends at a place."""
    start = place
    while start and text[start - 1].isspace():
        start -= 1
    return text[start:place]


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]
