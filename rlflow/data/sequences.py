"""Rows that say something of whole sequences: classified texts, related texts, queries with their documents.

algorithm        a row                                       sequences, and the label of each
classification   text, label                                 the text; its targets
embedding        anchor, positives, negatives                anchor 0, positives 1, negatives -1
                 sentence1, sentence2, score                 both texts, each with the score
reranker         query, positives, negatives; or documents   query and document: what the document is worth
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from rlflow.data.chat import Chat
from rlflow.data.class_labels import label_of, number_of, targets_of
from rlflow.data.encoding import Rendered
from rlflow.data.errors import DataError, RowError, Rows
from rlflow.data.formats import FORMATS, Record
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.messages import from_json_text
from rlflow.data.overlong import Overlong
from rlflow.data.records import load_records
from rlflow.data.sequence_format import answer_ids, format_of
from rlflow.data.sequence_texts import (
    Text,
    Words,
    alone,
    encode_texts,
    first_of,
    refuse_media,
    seen,
    several_of,
    together,
    words_of,
)
from rlflow.recipe import (
    AlgorithmBlock,
    ClassificationBlock,
    DataBlock,
    EmbeddingBlock,
    GenerativeRerankerBlock,
    RerankerBlock,
)
from rlflow.recipe.sequence_blocks import InfoNCEBlock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXT = ("messages", "conversations", "conversation", "text", "sentence", "prompt", "query", "sentence1", "content")
SECOND_TEXT = ("text_pair", "sentence2")
ANCHOR = ("messages", "anchor", "query", "sentence1", "question", "prompt")
POSITIVES = ("positive_messages", "positive", "positives", "document", "sentence2", "answer", "response")
NEGATIVES = ("negative_messages", "negative", "negatives", "rejected_response")
SCORE = ("label", "score", "labels")


@dataclass(frozen=True, slots=True)
class SequenceRow:
    """A row as its sequences."""

    id: str
    token_ids: tuple[np.ndarray, ...]
    """int32 [T] each."""
    labels: tuple[float, ...]
    """Of each: see above."""
    targets: np.ndarray | None = None
    """float32 [K]: what a classifier should put out, see `rlflow.data.class_labels.targets_of`."""

    images: tuple[bytes, ...] = ()
    """Encoded pictures of a classified text."""


@dataclass(frozen=True, slots=True)
class _Read:
    """A row on its way to a SequenceRow."""

    texts: Sequence[Text]
    labels: Sequence[float]
    targets: np.ndarray | None = None


def load_sequences(
    data: DataBlock,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    vision: ImageProcessor | None = None,
    *,
    algorithm: AlgorithmBlock,
) -> Rows[SequenceRow]:
    """The rows of ``data.train`` as the algorithm wants them; ``skipped`` names those that were left out.

    Args:
        vision: Of a model that takes pictures.

    Raises:
        DataError: A source or too many of its rows cannot be used (a label out of range, no positive, an empty text,
            the same document twice, pictures of what is no classified text), rows are overlong and must not be, or the
            tokenizer cannot write such sequences.
    """
    if data.system is not None:
        raise DataError("data.system is of conversations; put it into the rows' messages, or into their texts")
    chat, read = Chat(tokenizer, data.template_date, vision), _READERS[algorithm.learning.data_row]
    form = format_of(tokenizer, algorithm, data.template_date)
    if isinstance(algorithm, GenerativeRerankerBlock):
        answer_ids(tokenizer, algorithm.answers)

    def build(record: Record) -> _Read:
        refuse_media(record.columns, sees=isinstance(algorithm, ClassificationBlock))
        return read(record, algorithm, chat)

    rows = load_records(data.train, seed, build, as_columns=True)
    encoded = iter(encode_texts([text for row in rows for text in row.value.texts], chat, form, data.max_tokens))
    overlong = Overlong("max_tokens", data.max_tokens, data.overlong)
    kept: Rows[SequenceRow] = Rows(skipped=rows.skipped)
    for row in rows:
        sequences = [next(encoded) for _ in row.value.texts]
        longest = max(sequence.num_tokens for sequence in sequences)
        if longest > data.max_tokens and overlong.leaves_out(row, longest):
            continue
        token_ids = tuple(sequence.token_ids for sequence in sequences)
        problems = [sequence.problem for sequence in sequences if sequence.problem is not None]
        if problem := problems[0] if problems else _alike(token_ids, row.value.labels, algorithm):
            kept.skipped.append(row.bad(problem))
            continue
        images = tuple(image for text in row.value.texts if isinstance(text, Rendered) for image in text.images)
        kept.append(SequenceRow(row.id, token_ids, tuple(row.value.labels), row.value.targets, images))
    overlong.settle(kept)
    return kept


def _classified(record: Record, algorithm: AlgorithmBlock, chat: Chat) -> _Read:
    assert isinstance(algorithm, ClassificationBlock)
    text = classified_text(record, chat)
    return _Read([text], [0.0], targets_of(label_of(record.columns), algorithm.classification))


def classified_text(record: Record, chat: Chat) -> Text:
    """What a classifier reads of a row: a text, with its pictures if it has some, or a pair of texts.

    Raises:
        RowError: There is none, or it cannot be read.
    """
    columns = record.columns
    words = _column(columns, TEXT, words_of)
    if (name := first_of(columns, SECOND_TEXT)) is None:
        return seen(words, columns, record.directory, chat)
    refuse_media(columns)
    return together(words, words_of(columns[name], name), chat)


def _related(record: Record, algorithm: AlgorithmBlock, chat: Chat) -> _Read:
    assert isinstance(algorithm, EmbeddingBlock)
    block, columns = algorithm.embedding, record.columns
    anchor = _column(columns, ANCHOR, words_of)
    if block.query_prompt:
        if not isinstance(anchor, str):
            raise RowError("a conversation has no place for embedding.query_prompt: put it into its system message")
        anchor = block.query_prompt + anchor
    positives, score = _column(columns, POSITIVES, several_of), first_of(columns, SCORE)
    if not isinstance(block, InfoNCEBlock):
        if score is None:
            raise RowError(f"it has no `label` (or `score`), which {block.loss} compares with")
        if len(positives) != 1:
            raise RowError(f"it has {len(positives)} texts beside the first, and a label is of one")
        low, high, allowed = (-1.0, 1.0, None) if block.loss == "cosine_similarity" else (0.0, 1.0, (0.0, 1.0))
        value = _in_range(columns[score], score, low, high, allowed)
        return _Read([alone(anchor, chat), alone(positives[0], chat)], [value, value])
    if score is not None and number_of(columns[score], score) != 1:
        reason = f"`{score}` is {columns[score]!r}, and infonce learns from related texts: leave it out, or set"
        raise RowError(f"{reason} embedding.loss: contrastive or cosine_similarity")
    negatives = _negatives(columns)
    if not negatives and not block.in_batch_negatives:
        raise RowError("it has no negative, and embedding.in_batch_negatives is false: nothing to tell it from")
    _refuse_repeated(positives, negatives)
    labels = [0.0, *[1.0] * len(positives), *[-1.0] * len(negatives)]
    return _Read([alone(words, chat) for words in (anchor, *positives, *negatives)], labels)


def _ranked(record: Record, algorithm: AlgorithmBlock, chat: Chat) -> _Read:
    assert isinstance(algorithm, RerankerBlock)
    is_pointwise = algorithm.reranking.loss == "pointwise"
    query, documents, worth = _documents(dict(record.columns), needs_positive=not is_pointwise)
    _refuse_repeated(documents, [])
    if is_pointwise:
        worth = [_in_range(value, "label", 0.0, 1.0, None) for value in worth]
    elif len(set(worth)) < 2:
        reason = f"its {len(documents)} documents are all worth the same ({worth[0]:g}): {algorithm.reranking.loss} "
        raise RowError(f"{reason}compares better ones with worse ones of a query")
    texts = [together(query, document, chat) for document in documents]
    if isinstance(algorithm, GenerativeRerankerBlock) and not all(isinstance(text, tuple) for text in texts):
        raise RowError("the question about it takes a query and a document of one message each, not conversations")
    return _Read(texts, worth)


_READERS: dict[str, Callable[[Record, AlgorithmBlock, Chat], _Read]] = {
    "classified": _classified,
    "related": _related,
    "ranked": _ranked,
}
"""An algorithm's ``data_row`` -> function of a row as its columns."""


def _documents(columns: dict[str, Any], *, needs_positive: bool) -> tuple[Words, list[Words], list[float]]:
    """The query, its documents, and what each is worth.

    Args:
        needs_positive: Otherwise each document is learned for itself, and may be irrelevant like all others.

    Raises:
        RowError: There is no query or no document that is relevant, or labels and documents are not as many.
    """
    if "chosen" in columns and "rejected" in columns and first_of(columns, POSITIVES) is None:
        record = FORMATS["preference"](columns)
        assert record.rejected is not None
        chosen, rejected = list(record.messages), list(record.rejected)
        same = (index for index, pair in enumerate(zip(chosen, rejected, strict=False)) if pair[0] != pair[1])
        shared = next(same, min(len(chosen), len(rejected)))
        if not shared or shared in (len(chosen), len(rejected)):
            raise RowError("the chosen and the rejected answer are identical, or are to different prompts")
        sides = [words_of(side[shared:], "chosen") for side in (chosen, rejected)]
        return words_of(chosen[:shared], "prompt"), sides, [1.0, 0.0]
    query = _column(columns, ANCHOR, words_of)
    if (name := first_of(columns, ("documents", "passages"))) is not None:
        documents = several_of(columns[name], name)
        given = from_json_text(label_of(columns), "labels")
        if not isinstance(given, list) or len(given) != len(documents):
            raise RowError(f"`labels` are not one for each of its {len(documents)} documents")
        return query, documents, [number_of(value) for value in given]
    score = first_of(columns, SCORE)
    if score is not None and first_of(columns, NEGATIVES) is None:
        documents = [_column(columns, ("document", "passage", *POSITIVES), words_of)]
        return query, documents, [number_of(columns[score], score)]
    if score is not None and columns[score] in (0, False, "0"):
        raise RowError(f"`{score}` is 0, and it has negatives beside what would be positive: leave one of the two out")
    negatives = _negatives(columns)
    if negatives and first_of(columns, POSITIVES) is None:
        if needs_positive:
            raise RowError("it has no positive document, which its negatives are compared with")
        return query, negatives, [0.0] * len(negatives)
    positives = _column(columns, POSITIVES, several_of)
    if not positives:
        raise RowError("it has no positive document")
    return query, [*positives, *negatives], [1.0] * len(positives) + [0.0] * len(negatives)


def _column(columns: Mapping[str, Any], names: Sequence[str], read: Callable[[Any, str], Any]) -> Any:
    name = first_of(columns, names)
    if name is None:
        empty = [name for name in names if name in columns]
        if empty:
            raise RowError(f"`{empty[0]}` is empty")
        raise RowError(
            f"it has none of the columns {', '.join(names)} (its own are {', '.join(columns)}): name yours in the "
            f"source's `columns`, e.g. columns: {{{names[1]}: {next(iter(columns), 'yours')}}}"
        )
    return read(columns[name], name)


def _negatives(columns: Mapping[str, Any]) -> list[Words]:
    """Of one column, and of sentence-transformers' ``negative_1``, ``negative_2`` and so on."""
    numbered = sorted((name for name in columns if name.removeprefix("negative_").isdecimal()), key=len)
    names = [name for name in (first_of(columns, NEGATIVES), *numbered) if name is not None]
    return [words for name in names if columns[name] is not None for words in several_of(columns[name], name)]


def _refuse_repeated(positives: Sequence[Words], negatives: Sequence[Words]) -> None:
    """
    Raises:
        RowError: Two documents of a row are the same.
    """
    documents = [*positives, *negatives]
    for one, other in combinations(range(len(documents)), 2):
        if documents[one] == documents[other]:
            kinds = " (a positive and a negative)" if one < len(positives) <= other else ""
            raise RowError(f"its documents {one + 1} and {other + 1} are the same{kinds}")


def _alike(token_ids: Sequence[np.ndarray], labels: Sequence[float], algorithm: AlgorithmBlock) -> str | None:
    """What is wrong with documents of one row that are worth different things, and the same once they are cut."""
    first = 1 if isinstance(algorithm, EmbeddingBlock) else 0
    found: dict[bytes, int] = {}
    for index in range(first, len(token_ids)):
        other = found.setdefault(token_ids[index].tobytes(), index)
        if labels[other] != labels[index]:
            numbers = f"{other + 1 - first} and {index + 1 - first}"
            return f"its documents {numbers} are the same in their {len(token_ids[index]):,} tokens, and labelled apart"
    return None


def _in_range(value: Any, name: str, low: float, high: float, allowed: Sequence[float] | None) -> float:
    number = number_of(value, name)
    if not low <= number <= high or (allowed is not None and number not in allowed):
        wanted = f"{low:g} to {high:g}" if allowed is None else " or ".join(f"{one:g}" for one in allowed)
        raise RowError(f"`{name}` is {number:g}, out of range: it is to be {wanted}")
    return number
