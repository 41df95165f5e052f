"""What a model of sequences says of the rows of a file: classes, numbers, embeddings, scores of documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from rlflow.actors.train_engines import adapted_heads
from rlflow.actors.train_engines.scalar_model import ScalarModel
from rlflow.actors.train_engines.sequence_model import load_sequence_model
from rlflow.batching import pack
from rlflow.data.chat import Chat
from rlflow.data.encoding import Rendered
from rlflow.data.errors import DataError, RowError
from rlflow.data.formats import Record
from rlflow.data.image_processor import load_image_processor
from rlflow.data.records import load_records
from rlflow.data.sequence_format import format_of
from rlflow.data.sequence_texts import Text, alone, encode_texts, first_of, refuse_media, several_of, together, words_of
from rlflow.data.sequences import ANCHOR, POSITIVES, classified_text
from rlflow.data.tokenizer import load_tokenizer
from rlflow.data.videos import media_columns
from rlflow.model_source import ModelSource
from rlflow.recipe import AlgorithmBlock, ClassificationBlock, EmbeddingBlock, ModelBlock, RerankerBlock, SourceBlock
from rlflow.recipe.sequence_blocks import ClassesBlock
from rlflow.types import Sample

_CHUNK = 256
"""Rows whose outputs are computed before they are written."""
_TOKENS = 8192
"""Of a forward pass."""
_DOCUMENTS = ("documents", "passages", *POSITIVES)
_PLAIN = ("text", "document", "passage")
"""Columns of what is embedded as it is; others are queries, which have the query prompt before them."""


_Sequence = tuple[np.ndarray, tuple[bytes, ...]]
"""Token ids int32 [T], and the pictures in them."""


class _Row(NamedTuple):
    columns: dict[str, Any]
    sequences: list[_Sequence]


def says_of_sequences(source: ModelSource) -> bool:
    """Whether it is of a run that trains such a model, and no reward model."""
    return source.recipe is not None and bool(source.recipe.algorithm.learning.held_out)


def outputs_of_rows(source: ModelSource, data: SourceBlock) -> Iterator[list[dict[str, Any]]]:
    """The rows with what the model says of each, some at a time.

    Raises:
        DataError: The data or the model cannot be read.
    """
    assert source.recipe is not None
    algorithm, longest = source.recipe.algorithm, source.recipe.data.max_tokens
    block = ModelBlock(path=source.path, trust_remote_code=source.recipe.model.trust_remote_code)
    start = block if not source.is_adapter else block.model_copy(update={"path": source.base})
    tokenizer = load_tokenizer(block)
    day = source.recipe.data.template_date
    vision = load_image_processor(start.model_copy(update={"max_pixels": source.recipe.model.max_pixels}))
    chat, form = Chat(tokenizer, day, vision), format_of(tokenizer, algorithm, day)

    def build(record: Record) -> _Row:
        texts = _texts(record, algorithm, chat)
        sequences = encode_texts(texts, chat, form, longest)
        if problems := [sequence.problem for sequence in sequences if sequence.problem is not None]:
            raise RowError(problems[0])
        images = [text.images if isinstance(text, Rendered) else () for text in texts]
        columns = record.columns | media_columns([image for of_text in images for image in of_text])
        return _Row(columns, [*zip((sequence.token_ids for sequence in sequences), images, strict=True)])

    rows = load_records(data, 0, build, as_columns=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        module = load_sequence_model(start, algorithm, seed=0, device=device)
        if source.directory is not None and source.is_adapter:
            adapted_heads.put_on(module.model, source.directory)
    except (OSError, ValueError) as error:
        raise DataError(f"{source.path}: {error}") from error
    for start in range(0, len(rows), _CHUNK):
        part = [row.value for row in rows[start : start + _CHUNK]]
        said = iter(_outputs(module, [sequence for row in part for sequence in row.sequences], device))
        yield [row.columns | _said(np.stack([next(said) for _ in row.sequences]), algorithm) for row in part]


def _texts(record: Record, algorithm: AlgorithmBlock, chat: Chat) -> list[Text]:
    """
    Raises:
        RowError: A column is missing, or shows pictures that are not read.
    """
    columns, is_classified = record.columns, isinstance(algorithm, ClassificationBlock)
    refuse_media(columns, sees=is_classified)
    if is_classified:
        return [classified_text(record, chat)]
    if isinstance(algorithm, RerankerBlock):
        query, documents = _named(columns, ANCHOR), _named(columns, _DOCUMENTS)
        words = words_of(columns[query], query)
        return [together(words, document, chat) for document in several_of(columns[documents], documents)]
    assert isinstance(algorithm, EmbeddingBlock)
    name = _named(columns, (*_PLAIN, *ANCHOR))
    words = words_of(columns[name], name)
    if name not in _PLAIN and isinstance(words, str):
        words = algorithm.embedding.query_prompt + words
    return [alone(words, chat)]


def _named(columns: Mapping[str, Any], names: Sequence[str]) -> str:
    if (name := first_of(columns, names)) is None:
        raise RowError(f"it has none of the columns {', '.join(names)} (its own are {', '.join(columns)})")
    return name


@torch.no_grad()
def _outputs(module: ScalarModel, sequences: Sequence[_Sequence], device: torch.device) -> list[np.ndarray]:
    samples = [
        Sample(ids, np.ones(len(ids), dtype=bool), np.zeros(len(ids), dtype=np.float32), images=images)
        for ids, images in sequences
    ]
    found: list[Any] = [None] * len(samples)
    for micro_batch in pack(samples, max_tokens=_TOKENS, num_ranks=1)[0]:
        outputs = module(micro_batch, device, "scores").cpu().numpy()
        for index, value in zip(micro_batch.sample_indices.tolist(), outputs, strict=True):
            found[index] = value
    return found


def _said(outputs: np.ndarray, algorithm: AlgorithmBlock) -> dict[str, Any]:
    """outputs: [texts of the row] or [texts, D]."""
    if isinstance(algorithm, RerankerBlock):
        scores = [float(score) for score in outputs]
        return {"scores": scores, "ranking": np.argsort(-outputs, kind="stable").tolist()}
    values = outputs[0].astype(np.float64)
    if isinstance(algorithm, EmbeddingBlock):
        return {"embedding": (values / max(float(np.linalg.norm(values)), 1e-12)).tolist()}
    assert isinstance(algorithm, ClassificationBlock)
    problem = algorithm.classification
    if not isinstance(problem, ClassesBlock):
        return {"prediction": values.tolist() if len(values) > 1 else float(values[0])}
    labels = problem.labels or []
    if problem.problem == "multi_label":
        chances = 1.0 / (1.0 + np.exp(-values))
        chosen: Any = [label for label, chance in zip(labels, chances, strict=True) if chance > 0.5]
    else:
        shifted = np.exp(values - values.max())
        chances = shifted / shifted.sum()
        chosen = labels[int(chances.argmax())]
    return {"prediction": chosen, "probabilities": dict(zip(labels, chances.tolist(), strict=True))}
