"""Rows of a built-in generator for a tokenizer of single characters: whether they fit is known without rendering any.

Such a tokenizer makes a token of each character, and its own template puts contents end to end, eos behind an answer.
Where every character is known and every row is short enough, rendering them would say the same, after a second or two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from rlflow.data.errors import DataError, Rows
from rlflow.data.formats import Record
from rlflow.data.generated import GENERATORS
from rlflow.data.records import Loaded, load_records
from rlflow.recipe import ModelBlock, Recipe, SourceBlock

CLOSING = 1
"""Tokens behind an answer: eos."""


def rows_that_fit(
    sources: SourceBlock | Sequence[SourceBlock], recipe: Recipe, model: ModelBlock, *, is_prompt: bool
) -> list[Mapping[str, Any]] | None:
    """The columns of every row, as rewards get them; None where only rendering them tells whether they can be used.

    Args:
        model: Whose tokenizer the stage has.
        is_prompt: They are prompts, otherwise examples.
    """
    listed = [sources] if isinstance(sources, SourceBlock) else sources
    if model.path is not None or model.characters is None or model.chat_template or model.chat_template_kwargs:
        return None
    if recipe.data.system is not None or recipe.environment is not None:
        return None
    if any(source.generator not in GENERATORS for source in listed):
        return None
    try:
        records = _records(tuple(source.model_dump_json() for source in listed), recipe.run.seed)
    except DataError:
        return None
    limit = recipe.data.max_prompt_tokens if is_prompt else recipe.data.max_tokens
    known, columns = set(model.characters), []
    for row in records:
        if (of_row := _fitting(row.value, known, limit, is_prompt=is_prompt)) is None:
            return None
        columns.append(of_row)
    return None if records.skipped else columns


@lru_cache(maxsize=4)
def _records(sources: tuple[str, ...], seed: int) -> Rows[Loaded[Record]]:
    """The rows of sources in JSON: stages often share theirs. Nobody changes them."""
    return load_records([SourceBlock.model_validate_json(source) for source in sources], seed, lambda record: record)


def _fitting(record: Record, known: set[str], limit: int, *, is_prompt: bool) -> Mapping[str, Any] | None:
    """The columns of a row of one question and one answer that fits; None for any other."""
    if [message["role"] for message in record.messages] != ["user", "assistant"] or record.tools:
        return None
    question, answer = (message["content"] for message in record.messages)
    text = question if is_prompt else question + answer
    if not (question and answer and known.issuperset(text) and len(text) + CLOSING <= limit):
        return None
    return {"response": answer, **record.columns}
