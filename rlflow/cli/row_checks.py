"""The data of a recipe, read and tokenised as a run does it, before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlflow.cli.character_rows import rows_that_fit
from rlflow.cli.plugin_checks import sources_of
from rlflow.cli.sequence_checks import config_of, resolved
from rlflow.data.answers import loader_of
from rlflow.data.class_labels import with_labels
from rlflow.data.errors import DataError, Rows
from rlflow.data.examples import load_examples
from rlflow.data.image_counts import ImageCounts, count_images
from rlflow.data.image_processor import ImageProcessor, load_image_processor
from rlflow.data.new_model import sees, write_new_model
from rlflow.data.prompts import load_prompts
from rlflow.data.tokenizer import load_tokenizer
from rlflow.recipe import ModelBlock, Recipe, SourceBlock
from rlflow.types import Prompt

SMALL_BYTES = 64 << 20
"""Files that are read twice, to say within seconds what is wrong with them; a run alone reads larger ones."""


@dataclass(slots=True)
class Reading:
    """What reading the data of a stage brought."""

    problems: list[tuple[str, str]] = field(default_factory=list)
    """(dotted key, what is wrong and what to do)."""
    num_rows: int | None = None
    """Of training; None where they were not read."""
    images: ImageCounts = field(default_factory=ImageCounts)
    """Of training."""
    row: Mapping[str, Any] | None = None
    """The columns of a prompt, as rewards get them."""


def read_data(recipe: Recipe, to_come: Mapping[str, Recipe]) -> Reading:
    """Reads what the stage trains and evaluates on.

    Args:
        to_come: The directory that each earlier stage will write, and the stage: its tokenizer is that of its start.
    """
    reading = Reading()
    if config_of(recipe.model, to_come) is None:
        return reading  # on a hub that cannot be reached, which a run will say
    if (known := _known_to_fit(recipe, _start(recipe.model, to_come))) is not None:
        return known
    start = _start(recipe.model, to_come)
    with TemporaryDirectory() as scratch:
        try:
            if sees(start):
                write_new_model(start, Path(scratch))
                start = start.model_copy(update={"path": scratch})
            tokenizer = load_tokenizer(start)
        except DataError as error:
            reading.problems.append(("model.path", str(error).removeprefix("model.path: ")))
            return reading
        vision = None if start.path is None else load_image_processor(start)
        _read_rows(recipe, tokenizer, vision, reading)
    return reading


def _read_rows(recipe: Recipe, tokenizer: Any, vision: ImageProcessor | None, reading: Reading) -> None:
    """Adds what the rows bring to ``reading``."""
    try:
        recipe = with_labels(recipe)
    except DataError as error:
        reading.problems.append(("data.train", str(error)))
        return
    for key, load in _loaders(recipe, tokenizer, vision).items():
        try:
            rows = load()
        except DataError as error:
            reading.problems.append((key, str(error)))
            continue
        if key == "data.train":
            reading.num_rows = len(rows)
            reading.images = count_images((image for row in rows for image in row.images), vision)
        if reading.row is None and rows and isinstance(rows[0], Prompt):
            shown = {"images": []} if any(prompt.images for prompt in rows) else {}
            reading.row = (
                shown | {name: value for prompt in rows for name, value in prompt.columns.items()} | rows[0].columns
            )


def _known_to_fit(recipe: Recipe, model: ModelBlock) -> Reading | None:
    """What rendering the rows would find, where that is known without it: that all of them can be used."""
    read_whole = recipe.environment is not None or recipe.demonstrations is not None
    if recipe.algorithm.learning.data_row not in ("prompt", "example") or read_whole:
        return None
    reading = Reading()
    is_online = recipe.family == "online"
    kinds = {"data.train": (recipe.data.train, is_online)}
    for key, block in recipe.evaluations.items():
        kinds[f"{key}.data"] = (block.data, is_online or recipe.reward_of(block) is not None)
    for key, (sources, is_prompt) in kinds.items():
        columns = rows_that_fit(sources, recipe, model, is_prompt=is_prompt)
        if columns is None:
            return None
        if key == "data.train":
            reading.num_rows = len(columns)
        if reading.row is None and is_prompt:
            reading.row = columns[0]
    return reading


def _named_tools(recipe: Recipe) -> list[dict[str, Any]]:
    """The functions that the environment names, without what they take: no code of the user's is imported."""
    names = [] if recipe.environment is None else [tool.rpartition(":")[2] for tool in recipe.environment.tools]
    parameters = {"type": "object", "properties": {}}
    return [{"type": "function", "function": {"name": n, "description": "", "parameters": parameters}} for n in names]


def is_small(recipe: Recipe) -> bool:
    """Whether all of the data is here, and little enough to be read once more."""
    paths = [Path(source.path) for source in sources_of(recipe).values() if source.path is not None]
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return all(path.exists() for path in paths) and sum(file.stat().st_size for file in files) <= SMALL_BYTES


def _start(model: ModelBlock, to_come: Mapping[str, Recipe]) -> ModelBlock:
    """The model whose tokenizer the stage will have, with the template that the recipe gives it."""
    start = resolved(model, to_come)
    template = model.chat_template if model.chat_template is not None else start.chat_template
    return start.model_copy(update={"chat_template": template})


def _loaders(recipe: Recipe, tokenizer: Any, vision: ImageProcessor | None) -> Mapping[str, Callable[[], Rows[Any]]]:
    """What reads the rows of each key."""
    data, seed = recipe.data, recipe.run.seed

    def prompts(source: SourceBlock | Sequence[SourceBlock]) -> Rows[Any]:
        in_turns = recipe.environment is not None
        return load_prompts(source, data, tokenizer, seed, tools=_named_tools(recipe), vision=vision, in_turns=in_turns)

    def examples(source: SourceBlock | Sequence[SourceBlock]) -> Rows[Any]:
        return loader_of(recipe.algorithm)(data.model_copy(update={"train": source}), tokenizer, seed, vision)

    def prompts_with_answers(source: SourceBlock | Sequence[SourceBlock]) -> Rows[Any]:
        load_examples(data.model_copy(update={"train": source}), tokenizer, seed)
        return prompts(source)

    of_training = prompts if recipe.family == "online" else examples
    loaders = {"data.train": partial(prompts_with_answers if recipe.trains_answers else of_training, data.train)}
    if recipe.demonstrations is not None:
        shown = data.model_copy(update={"train": recipe.demonstrations.train})
        loaders["demonstrations.train"] = partial(load_examples, shown, tokenizer, seed, vision)
    for key, block in recipe.evaluations.items():
        read = examples if recipe.reward_of(block) is None else prompts
        loaders[f"{key}.data"] = partial(read, block.data)
    return loaders
