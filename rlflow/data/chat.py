"""Messages to text by the chat template, text to tokens, and which of the tokens are trained.

The template decides the text, so it also decides where an answer begins and ends; nothing is searched for in the
text, which may hold anything. An assistant turn is trained

    from    the end of the generation prompt before it, which is where the policy starts to write,
    to      the end-of-turn token after it, included; what the template puts behind that is not trained.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlflow.data.errors import DataError, RowError
from rlflow.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MARKER = "\ue000\ue001\ue000"
"""Stands for an answer while its place in the text is found: private-use characters, which no template changes."""
EMPTY_THINK = re.compile(r"\s*(?:<think>)?\s*</think>\s*")
"""Some generation prompts hold the opening tag already."""
BATCH = 1024
"""Texts tokenised at a time."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text and the parts of it that are trained."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """[start, end) in characters."""


class Chat:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self._closing, closing_id = self._find_closing()
        ends = (tokenizer.eos_token_id, closing_id)
        self.end_ids = tuple(sorted({token for token in ends if isinstance(token, int)}))
        """eos and the chat template's end of turn."""
        self._characters = _characters(tokenizer)

    def render_prompt(self, messages: Sequence[Message], tools: list[Any] | None = None) -> str:
        """The text up to where the policy starts to write.

        Raises:
            RowError: the template refuses the messages, or a character tokenizer lacks one of their characters.
        """
        return self._check_characters(self._render(messages, tools, generation_prompt=True))

    def render_conversation(
        self,
        messages: Sequence[Message],
        turns: Collection[int],
        tools: list[Any] | None = None,
        *,
        ignore_empty_think: bool = False,
    ) -> Rendered:
        """The whole text, with the assistant turns of these indices trained.

        Raises:
            RowError: as above, or the template renders a turn so that it cannot be found in the text.
        """
        text = self._check_characters(self._render(messages, tools))
        spans = []
        for turn in turns:
            start, end = self._span(text, messages, turn, tools)
            if ignore_empty_think and (empty := EMPTY_THINK.match(text, start, end)):
                start = empty.end()
            spans.append((start, end))
        return Rendered(text, tuple(spans))

    def render_text(self, text: str, *, complete: bool) -> str:
        """Plain text behind the bos token, where the tokenizer has that habit; ``complete`` adds eos."""
        tokenizer = self.tokenizer
        if complete and tokenizer.eos_token is None:
            raise DataError(
                "the tokenizer has no eos token to end a text with. Set eos_token in tokenizer_config.json."
            )
        begins = tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        self._check_characters(text)
        return f"{tokenizer.bos_token if begins else ''}{text}{tokenizer.eos_token if complete else ''}"

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each rendered text, int32 [T]."""
        return [
            np.array(ids, dtype=np.int32)
            for batch in _batches(texts)
            for ids in self._tokenize(batch, offsets=False)["input_ids"]
        ]

    def encode_trained(self, rendered: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(token ids int32 [T], loss mask bool [T]) of each.

        A token is trained when all of it lies in a span. Position 0 never is: nothing predicts it.
        """
        examples = []
        end_ids = np.array(self.end_ids)
        for batch in _batches(rendered):
            tokens = self._tokenize([item.text for item in batch], offsets=True)
            for item, ids, offsets in zip(batch, tokens["input_ids"], tokens["offset_mapping"], strict=True):
                token_ids = np.array(ids, dtype=np.int32)
                closes = (token_ids[:, None] == end_ids).any(axis=1)
                examples.append((token_ids, _loss_mask(item.spans, offsets, closes)))
        return examples

    def _render(self, messages: Sequence[Message], tools: list[Any] | None, *, generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        template = self.tokenizer.chat_template
        if template is None:
            raise DataError(
                "the tokenizer has no chat template. Set model.chat_template, or `format: text` in the data source "
                "when the rows are plain text."
            )
        if tools and "tools" not in str(template):
            raise RowError("it has `tools`, which the chat template does not show to the policy")
        if any("tool_calls" in message for message in messages) and "tool_calls" not in str(template):
            raise RowError("it has function calls, which the chat template leaves out")
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=generation_prompt
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise RowError(f"the chat template refuses it: {error}") from error
        assert isinstance(text, str)
        return text

    def _span(self, text: str, messages: Sequence[Message], turn: int, tools: list[Any] | None) -> tuple[int, int]:
        """Where assistant turn ``turn`` is in ``text``.

        With the marker in its place, the template shows what it puts before and behind the turn.
        """
        marked = [*messages[:turn], {"role": "assistant", "content": MARKER}, *messages[turn + 1 :]]
        before, found, behind = self._render(marked, tools).partition(MARKER)
        starts = [self._render(messages[:turn], tools, generation_prompt=True)] if turn else []
        start = next((len(prefix) for prefix in [*starts, before] if text.startswith(prefix)), None)
        end = len(text) - len(behind)
        if not found or start is None or not text.endswith(behind) or end <= start:
            raise RowError(
                f"the chat template leaves messages[{turn}] out or changes what is around it, so that its tokens "
                "cannot be told. For SFT, data.loss_on: last_assistant trains the last turn alone"
            )
        return start, end + (len(self._closing) if behind.startswith(self._closing) else 0)

    def _find_closing(self) -> tuple[str, int | None]:
        """The special tokens that the template puts behind an answer, as text, and the id of the last of them."""
        tokenizer = self.tokenizer
        if tokenizer.chat_template is None:
            return "", None
        exchange = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": MARKER}]
        try:
            behind = self._render(exchange, None).partition(MARKER)[2]
        except RowError as error:
            raise DataError(
                f"a question and an answer cannot be rendered: {error}. Set model.chat_template."
            ) from error
        special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        longest_first = sorted(special, key=len, reverse=True)
        closing = re.match(rf"\s*({'|'.join(map(re.escape, longest_first))})+", behind) if special else None
        return (closing[0], special[closing[1]]) if closing else ("", None)

    def _check_characters(self, text: str) -> str:
        if self._characters is not None:
            bare = re.sub("|".join(map(re.escape, self.tokenizer.all_special_tokens)), "", text)
            unknown = sorted(set(bare) - self._characters)
            if unknown:
                raise RowError(f"the character {unknown[0]!r} is not in model.characters")
        return text

    def _tokenize(self, texts: Sequence[str], *, offsets: bool) -> Any:
        return self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )


def _loss_mask(spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]], closes: np.ndarray) -> np.ndarray:
    """bool [T]: which tokens lie in a span. ``offsets``: [start, end) of each; ``closes``: bool [T], ends a turn."""
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    # Byte-level tokenizers leave a token's leading space out of its offsets.
    starts = np.minimum(starts, np.concatenate([[0], ends[:-1]]))
    mask = np.zeros(len(ends), dtype=bool)
    for start, end in spans:
        # An end-of-turn token may be one that swallows the whitespace behind it.
        mask |= (starts >= start) & ((ends <= end) | (closes & (starts < end)))
    mask[:1] = False
    return mask


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def _characters(tokenizer: PreTrainedTokenizerFast) -> set[str] | None:
    """The characters of a character tokenizer, which has no token for any other; None of every other tokenizer."""
    from tokenizers.models import WordLevel

    model = tokenizer.backend_tokenizer.model
    vocabulary = set(tokenizer.get_vocab())
    return vocabulary if isinstance(model, WordLevel) and model.unk_token not in vocabulary else None
