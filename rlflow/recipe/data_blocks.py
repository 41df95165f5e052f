"""What a recipe learns from."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from rlflow.recipe.block import Block, Conflict, NonNegativeInt, PositiveInt, exactly_one, malformed_function


class SourceBlock(Block):
    path: str | None = None
    """A local file (JSON, JSONL, CSV, Parquet; .gz too), a run's `rollouts` directory, or a hub dataset id."""
    stage: str | None = None
    """An earlier stage of this recipe, of algorithm sample: what it kept."""
    generator: str | None = None
    """Rows made by a function: a name of rlflow.data.generated, or `file.py:function`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the generator."""
    subset: str | None = None
    """Configuration of a hub dataset, or its folder where it has none."""
    split: str = "train"
    """Split of a hub dataset."""
    rows: PositiveInt | None = None
    """Use this many rows, drawn with the run's seed; repeats when the set is smaller."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our name -> the file's column, e.g. {prompt: question, solution: answer}."""
    where: str | None = None
    """Which rows are used, e.g. `reward > 0.9` of a run's rollouts or of the answers that `rlflow infer` wrote: a
    condition on the columns, as `rlflow inspect --where` has it."""
    label: str | None = None
    """For algorithms that learn from labelled answers (kto): which are desirable, e.g. `reward > 0.5`, a condition as
    `where`; the column `label` when absent."""
    format: Literal["auto", "messages", "sharegpt", "instruction", "prompt", "preference", "kto", "text"] = "auto"
    """How a row becomes messages."""
    reasoning: Literal["field", "inline"] = "field"
    """A thought that a row keeps apart (`reasoning_content`, `reasoning`, `thinking`, a part of a content): as the
    field that the chat template reads, or inline, as `<think>` text before the answer, for templates that read none."""
    max_bad_rows: NonNegativeInt = 0
    """How many malformed rows may be skipped (each is named) before the run refuses to start."""

    def conflicts(self) -> Iterator[Conflict]:
        if (self.path is None) == (self.generator is None):
            yield Conflict(("path", "generator"), exactly_one(path=self.path, generator=self.generator))
        if self.generator is None and self.args:
            yield Conflict(("args", "generator"), "are a generator's: give generator, or remove them")
        if self.generator is not None and self.split != "train":
            yield Conflict(("split", "generator"), "is a dataset's, and rows come from a generator: set it in args")
        if self.generator is not None and self.subset is not None:
            yield Conflict(("subset", "generator"), "is a hub dataset's, and rows come from a generator: remove it")
        if self.generator is not None and self.where is not None:
            yield Conflict(("where", "generator"), "is for stored rows, and these come from a generator: remove it")
        if self.label is not None and "label" in self.columns:
            yield Conflict(("label", "columns"), "has a condition and a column: remove one of them")
        if self.generator is not None and ":" in self.generator:
            yield from malformed_function("generator", self.generator)


OneOrSeveral = Annotated[
    Annotated[SourceBlock, Tag("<one>")] | Annotated[list[SourceBlock], Tag("<several>")],
    Discriminator(lambda given: "<several>" if isinstance(given, list) else "<one>"),
]


class DataBlock(Block):
    train: OneOrSeveral
    """Where the rows come from; several are concatenated."""
    prompts_per_step: PositiveInt = 16
    """Prompts (online) or examples (offline) a step."""
    max_prompt_tokens: PositiveInt = 1024
    """Longest prompt."""
    max_tokens: PositiveInt = 2048
    """Longest example of offline training, prompt and answer."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """Rows beyond these limits: refuse to start, leave them out, or cut (prompts by their oldest turns and the middle
    of the longest message, examples from the right)."""
    system: str | None = None
    """System message put before every prompt that has none."""
    shuffle: bool = True
    """A new order every epoch, from the run's seed."""
    loss_on: Literal["last_assistant", "all_assistant", "all"] = "all_assistant"
    """SFT: which messages are trained."""
    ignore_empty_think: bool = False
    """SFT: no loss on an empty `<think></think>`."""
    template_date: date | None = None
    """What a chat template writes that writes the date, e.g. 2026-01-31; the day the run starts when absent."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.train == []:
            yield Conflict(("train",), "is empty: give at least one source")
