"""The data of a recipe before anything starts: read and tokenised as a run does it, or read alone.

Reading alone imports no tokenizer, but where an environment has tools, which the chat template must show: every row is
there, and has what its format needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlflow.cli.character_rows import rows_that_fit
from rlflow.cli.plugin_checks import Found, sources_of
from rlflow.cli.sequence_checks import config_of, resolved
from rlflow.data.answers import loader_of
from rlflow.data.call_reader import require_readable
from rlflow.data.chat import QUESTION, Chat
from rlflow.data.class_labels import label_of, with_labels
from rlflow.data.errors import DataError, RowError, Rows
from rlflow.data.examples import load_examples
from rlflow.data.formats import Record
from rlflow.data.image_counts import ImageCounts, count_images
from rlflow.data.image_processor import ImageProcessor, load_image_processor
from rlflow.data.new_model import sees, write_new_model
from rlflow.data.prompts import load_prompts, require_chat
from rlflow.data.records import load_records
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
    tokenized: bool = True
    """Whether it is known which rows the chat template and the limits leave; otherwise ``num_rows`` counts them all."""
    images: ImageCounts = field(default_factory=ImageCounts)
    """Of training."""
    row: Mapping[str, Any] | None = None
    """The columns of a prompt, as rewards get them."""


def read_data(
    recipe: Recipe, to_come: Mapping[str, Recipe], tools: Sequence[Any] = (), *, tokenize: bool = True
) -> Reading:
    """Reads what the stage trains and evaluates on.

    Args:
        to_come: The directory that each earlier stage will write, and the stage: its tokenizer is that of its start.
        tools: JSON schemas of what the environment describes to the policy.
        tokenize: Rows are rendered and tokenised as well. Those of a model that takes pictures always are, as the
            sizes of these decide what a step needs, and those of a new one, whose characters are few.
    """
    reading = Reading()
    config = config_of(recipe.model, to_come)
    if config is None:
        return reading  # on a hub that cannot be reached, which a run will say
    start = _start(recipe.model, to_come)
    if (known := _known_to_fit(recipe, start)) is not None:
        return known
    if not tokenize and start.path is not None and not {"vision_config", "audio_config"} & config.keys():
        return _read_forms(recipe, list(_in_tools(recipe, start, tools)))
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
        _read_rows(recipe, tokenizer, vision, tools, reading)
        if tools and not reading.problems:
            reading.problems += _in_calls(recipe, Chat(tokenizer))
    return reading


def _read_rows(
    recipe: Recipe, tokenizer: Any, vision: ImageProcessor | None, tools: Sequence[Any], reading: Reading
) -> None:
    """Adds what the rows bring to ``reading``."""
    try:
        recipe = with_labels(recipe)
    except DataError as error:
        reading.problems.append(("data.train", str(error)))
        return
    for key, load in _loaders(recipe, tokenizer, vision, tools).items():
        try:
            rows = load()
        except DataError as error:
            reading.problems.append((key, str(error)))
            continue
        if key == "data.train":
            reading.num_rows = len(rows)
            reading.images = count_images((image for row in rows for image in row.images), vision)
        if reading.row is None and rows and isinstance(rows[0], Prompt):
            shown = {"images": [], "videos": []} if any(prompt.images for prompt in rows) else {}
            reading.row = shown | _all_columns([prompt.columns for prompt in rows])


def _all_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first row, with columns that others alone have."""
    return {name: value for row in rows for name, value in row.items()} | dict(rows[0])


def _known_to_fit(recipe: Recipe, model: ModelBlock) -> Reading | None:
    """What rendering the rows would find, where that is known without it: that all of them can be used."""
    read_whole = recipe.environment is not None or recipe.demonstrations is not None
    if recipe.algorithm.learning.data_row not in ("prompt", "example") or read_whole:
        return None
    reading = Reading()
    for key, (sources, is_prompt) in _sources(recipe).items():
        columns = rows_that_fit(sources, recipe, model, is_prompt=is_prompt)
        if columns is None:
            return None
        if key == "data.train":
            reading.num_rows = len(columns)
        if reading.row is None and is_prompt:
            reading.row = _all_columns(columns)
    return reading


def _sources(recipe: Recipe) -> Mapping[str, tuple[SourceBlock | Sequence[SourceBlock], bool]]:
    """Key -> sources of what is trained and evaluated on, and whether their rows are prompts."""
    is_online = recipe.generates
    kinds: dict[str, tuple[Any, bool]] = {"data.train": (recipe.data.train, is_online)}
    if recipe.demonstrations is not None:
        kinds["demonstrations.train"] = (recipe.demonstrations.train, False)
    for key, block in recipe.evaluations.items():
        kinds[f"{key}.data"] = (block.data, is_online or recipe.reward_of(block) is not None)
    return kinds


def _in_tools(recipe: Recipe, start: ModelBlock, tools: Sequence[Any]) -> Found:
    """Of an environment's tools, which the chat template may not show."""
    if not tools:
        return
    try:
        chat = Chat(load_tokenizer(start))
        chat.require_calls_and_tools([QUESTION], list(tools), generation_prompt=True)
    except (RowError, DataError) as error:
        yield "environment", str(error)
    else:
        yield from _in_calls(recipe, chat)


def _in_calls(recipe: Recipe, chat: Chat) -> Found:
    """Of calls, which the chat template may write in a form that cannot be told from it."""
    if recipe.environment is not None and chat.has_template:
        try:
            require_readable(chat, recipe.environment.call_parser)
        except RowError as error:
            yield "environment.call_parser", str(error)


def _read_forms(recipe: Recipe, problems: list[tuple[str, str]]) -> Reading:
    """What reading the rows brings, without rendering them; ``problems`` are known already."""
    reading = Reading(problems, tokenized=False)
    for key, (sources, is_prompt) in _sources(recipe).items():
        learning = recipe.algorithm.learning
        kind = "prompt" if is_prompt else "example" if key == "demonstrations.train" else learning.data_row
        try:
            rows = load_records(
                sources,
                recipe.run.seed,
                partial(_columns_of, kind=kind, in_turns=recipe.environment is not None),
                judged=kind in ("labelled", "judged"),
                as_columns=not is_prompt and bool(learning.held_out),
            )
        except DataError as error:
            reading.problems.append((key, str(error)))
            continue
        if key == "data.train":
            reading.num_rows = len(rows)
        if reading.row is None and is_prompt and rows:
            reading.row = _all_columns([row.value for row in rows])
    return reading


def _columns_of(record: Record, kind: str, in_turns: bool) -> Mapping[str, Any]:
    """A record's columns, as rewards get them.

    Raises:
        RowError: It lacks what the algorithm learns from.
    """
    if kind in ("pair", "margin_pair") and record.rejected is None:
        raise RowError("it has no rejected answer")
    if kind in ("labelled", "judged") and record.label is None:
        raise RowError("it has no `label`")
    if kind == "classified":
        label_of(record.columns)
    answers = (message["role"] == "assistant" for message in record.messages)
    if kind == "example" and record.text is None and not any(answers):
        raise RowError("it has no assistant answer to learn")
    if kind == "prompt" and in_turns:
        require_chat(record)
    if kind == "prompt" and record.messages and record.messages[-1]["role"] == "assistant":
        return {"response": record.messages[-1]["content"], **record.columns}
    return record.columns


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


def _loaders(
    recipe: Recipe, tokenizer: Any, vision: ImageProcessor | None, tools: Sequence[Any]
) -> Mapping[str, Callable[[], Rows[Any]]]:
    """What reads the rows of each key."""
    data, seed = recipe.data, recipe.run.seed

    def prompts(source: SourceBlock | Sequence[SourceBlock]) -> Rows[Any]:
        in_turns = recipe.environment is not None
        return load_prompts(source, data, tokenizer, seed, tools=tools, vision=vision, in_turns=in_turns)

    def examples(source: SourceBlock | Sequence[SourceBlock]) -> Rows[Any]:
        return loader_of(recipe.algorithm)(data.model_copy(update={"train": source}), tokenizer, seed, vision)

    def prompts_with_answers(source: SourceBlock | Sequence[SourceBlock]) -> Rows[Any]:
        load_examples(data.model_copy(update={"train": source}), tokenizer, seed)
        return prompts(source)

    of_training = prompts if recipe.generates else examples
    loaders = {"data.train": partial(prompts_with_answers if recipe.trains_answers else of_training, data.train)}
    if recipe.demonstrations is not None:
        shown = data.model_copy(update={"train": recipe.demonstrations.train})
        loaders["demonstrations.train"] = partial(load_examples, shown, tokenizer, seed, vision)
    for key, block in recipe.evaluations.items():
        read = examples if recipe.reward_of(block) is None else prompts
        loaders[f"{key}.data"] = partial(read, block.data)
    return loaders
