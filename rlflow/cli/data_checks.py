"""What a recipe says of its data and its chat template, against what is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from rlflow.data.errors import DataError
from rlflow.data.peek import problems
from rlflow.data.tokenizer import load_tokenizer
from rlflow.recipe import Recipe, SourceBlock

Found = Iterator[tuple[str, str]]


def in_sources(sources: Mapping[str, SourceBlock]) -> Found:
    """Splits, subsets, columns and arguments that the data does not have."""
    for key, source in sources.items():
        for below, message in problems(source):
            yield f"{key}.{below}", message


def in_template(recipe: Recipe) -> Found:
    """Settings of the chat template that it does not read, where the tokenizer is here."""
    model = recipe.model
    if not model.chat_template_kwargs or (model.path is not None and not Path(model.path).is_dir()):
        return
    try:
        load_tokenizer(model)
    except DataError as error:
        yield "model.chat_template_kwargs", str(error).removeprefix("model.chat_template_kwargs: ")
