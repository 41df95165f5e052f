"""How a text, or a query and a document, become one sequence that a number is said of, and tokenizers that do the same.

    text                 [bos] text eos
    query and document   [bos] query "\\n" document eos

Each text is encoded alone, so that a tokenizer's post-processor can put them together: transformers and
sentence-transformers, which know nothing of this, then read what was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np

from rlflow.data.chat import Chat
from rlflow.data.encoding import BATCH
from rlflow.data.errors import DataError, RowError
from rlflow.recipe import AlgorithmBlock, GenerativeRerankerBlock
from rlflow.recipe.sequence_blocks import YesNoBlock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SEPARATOR = "\n"
_QUERY, _DOCUMENT = "QUERY9731", "DOCUMENT9731"
"""What stands for them in a question until it is rendered."""


@dataclass(frozen=True, slots=True)
class SequenceFormat:
    """The ids around and between the texts of a sequence."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    behind: tuple[int, ...]
    around_one: tuple[tuple[int, ...], tuple[int, ...]]
    """Before and behind a text that is alone."""

    def joined(self, texts: Sequence[np.ndarray], max_tokens: int) -> np.ndarray:
        """One text or two, int32 [T]; the last of them is cut where they are more than ``max_tokens``.

        Args:
            texts: int32 [L] each.
        """
        before, behind = self._around(texts)
        *first, last = texts
        head = np.concatenate([np.array(before), *(np.append(text, self.between) for text in first), last])
        return np.append(head[: max(1, max_tokens - len(behind))], behind).astype(np.int32)

    def num_tokens(self, texts: Sequence[np.ndarray]) -> int:
        """Of the whole sequence, uncut."""
        around = sum(map(len, self._around(texts))) + len(self.between) * (len(texts) - 1)
        return around + sum(map(len, texts))

    def room(self, texts: Sequence[np.ndarray], max_tokens: int) -> int:
        """For so many tokens of the last text there is room beside all else."""
        return max_tokens - self.num_tokens([*texts[:-1], texts[-1][:0]])

    def _around(self, texts: Sequence[np.ndarray]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.around_one if len(texts) == 1 else (self.before, self.behind)


def format_of(tokenizer: PreTrainedTokenizerFast, algorithm: AlgorithmBlock, day: date | None = None) -> SequenceFormat:
    """How an algorithm's sequences are put together.

    Args:
        day: What the chat template writes where it writes the date.

    Raises:
        DataError: The tokenizer has no eos token, or its chat template does not show the query and the document.
    """
    if isinstance(algorithm, GenerativeRerankerBlock):
        return _question_format(tokenizer, algorithm.answers, day)
    return _plain_format(tokenizer)


def answer_ids(tokenizer: PreTrainedTokenizerFast, answers: YesNoBlock) -> tuple[int, int]:
    """The tokens of ``answers.positive`` and ``answers.negative``.

    Raises:
        DataError: One of them is not one token.
    """
    ids = []
    for key in ("positive", "negative"):
        (encoded,) = encode_alone(tokenizer, [word := getattr(answers, key)])
        if len(encoded) != 1 or encoded[0] == tokenizer.unk_token_id:
            raise DataError(
                f"algorithm.answers.{key}: {word!r} is {len(encoded)} tokens of this model: give one of one"
            )
        ids.append(int(encoded[0]))
    return ids[0], ids[1]


def encode_alone(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text without what a tokenizer puts around one, int32 [L]."""
    return [
        np.array(ids, dtype=np.int32)
        for start in range(0, len(texts), BATCH)
        for ids in tokenizer(
            list(texts[start : start + BATCH]), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
    ]


def reading_texts(tokenizer: PreTrainedTokenizerFast, form: SequenceFormat) -> PreTrainedTokenizerFast:
    """The tokenizer, which from now on puts texts and pairs of texts together in this format."""
    from tokenizers import processors

    first, last = form.around_one
    parts = {
        "<first>": first,
        "<last>": last,
        "<before>": form.before,
        "<between>": form.between,
        "<behind>": form.behind,
    }
    special = [
        {"id": name, "ids": list(ids), "tokens": tokenizer.convert_ids_to_tokens(list(ids))}
        for name, ids in parts.items()
        if ids
    ]

    def template(*pieces: str) -> list[str]:
        # Type ids, the number behind each colon, are all 0: decoders have none.
        return [f"{piece}:0" for piece in pieces if piece not in parts or parts[piece]]

    backend: Any = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single=template("<first>", "$A", "<last>"),
        pair=template("<before>", "$A", "<between>", "$B", "<behind>"),
        special_tokens=special,
    )
    return tokenizer


def _plain_format(tokenizer: PreTrainedTokenizerFast) -> SequenceFormat:
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if not isinstance(eos, int):
        raise DataError(
            "the tokenizer has no eos token, at which a text's number is read. Set eos_token in tokenizer_config.json."
        )
    begins = isinstance(bos, int) and tokenizer("a").input_ids[:1] == [bos]
    (between,) = encode_alone(tokenizer, [_SEPARATOR])
    unknown = not len(between) or tokenizer.unk_token_id in between.tolist()
    before = (int(bos),) if begins else ()  # pyright: ignore[reportArgumentType]
    return SequenceFormat(before, (eos,) if unknown else tuple(between.tolist()), (eos,), (before, (eos,)))


def _question_format(tokenizer: PreTrainedTokenizerFast, answers: YesNoBlock, day: date | None) -> SequenceFormat:
    """What the chat template makes of the question whether a document answers a query, up to the model's answer."""
    about = f"Query:\n{_QUERY}\nDocument:\n{_DOCUMENT}"
    question = f"{answers.instruction}\n{about}\nAnswer {answers.positive} or {answers.negative}."
    try:
        text = Chat(tokenizer, day).render_prompt([{"role": "user", "content": question}]).text
    except RowError as error:
        raise DataError(f"algorithm.answers: the question cannot be rendered: {error}") from error
    before, query, rest = text.partition(_QUERY)
    between, document, behind = rest.partition(_DOCUMENT)
    if not (query and document):
        raise DataError(
            "the chat template does not show the query and the document as they are. Set model.chat_template"
        )
    parts = (tuple(ids.tolist()) for ids in encode_alone(tokenizer, [before, between, behind]))
    return SequenceFormat(*parts, around_one=(_plain_format(tokenizer).before, ()))
