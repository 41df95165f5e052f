"""Texts that a scheme is fitted to, and others that it is measured on, as token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlflow.data.chat import Chat
from rlflow.data.encoding import Rendered
from rlflow.data.errors import DataError
from rlflow.data.formats import Record, with_system
from rlflow.data.records import load_records
from rlflow.data.sampler import permutation
from rlflow.model_source import ModelSource
from rlflow.quantization.schemes import Scheme
from rlflow.recipe import SourceBlock
from rlflow.tracking.rollouts import RolloutFileError, read_rollouts, rollouts_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CALIBRATION_TEXTS, HELD_OUT_TEXTS = 128, 64
MOST_TOKENS = 512
"""Of a text; what is longer is cut."""
MOST_TEXTS = CALIBRATION_TEXTS + HELD_OUT_TEXTS

TokenIds = list[int]


@dataclass(frozen=True, slots=True)
class Texts:
    """Token ids of each text, and where they are from."""

    token_ids: Sequence[TokenIds]
    origin: str


def choose_texts(
    source: ModelSource,
    scheme: Scheme,
    tokenizer: PreTrainedTokenizerFast,
    calibration: Path | None,
    held_out: Path | None,
    tell: Callable[[str], None],
) -> tuple[Texts | None, Texts | None]:
    """What the scheme is calibrated on, None where it needs nothing, and what it is measured on, None where there is
    nothing.

    Texts are a file's rows, or else the run's own: rollouts, or training data for a scheme that is calibrated. Measured
    on is a file of its own, or what the run evaluates on where its rows have answers, or else a part that is not
    calibrated on: an eighth, or all of it for a scheme that is not calibrated.

    Raises:
        DataError: A file cannot be read, or there is nothing to calibrate on.
    """
    reader = _Reader(source, tokenizer)
    measured = None if held_out is None else reader.file(held_out)
    if measured is None and calibration is None:
        measured = reader.evaluation(tell)
    texts = reader.rollouts() if calibration is None else reader.file(calibration)
    if texts is None and scheme.is_calibrated:
        texts = reader.training()
    if not scheme.is_calibrated:
        return None, _first(measured or texts, HELD_OUT_TEXTS)
    if texts is None:
        raise DataError(
            f"--quantize {scheme.name} is fitted to texts: give --calibration FILE with some {CALIBRATION_TEXTS} rows "
            "like those that the model shall answer, in any format that data.train takes"
        )
    rows = texts.token_ids
    if measured is None:
        kept = min(max(len(rows) // 8, 1), HELD_OUT_TEXTS)
        measured, rows = Texts(rows[:kept], texts.origin), rows[kept:]
    if not rows:
        raise DataError(f"{texts.origin}: one row is too few to hold another out: more rows, or --held-out FILE")
    return _first(Texts(rows, texts.origin), CALIBRATION_TEXTS), _first(measured, HELD_OUT_TEXTS)


def _first(texts: Texts | None, most: int) -> Texts | None:
    return None if texts is None else Texts([ids[:MOST_TOKENS] for ids in texts.token_ids[:most]], texts.origin)


class _Reader:
    """Reads texts, rendered as the model was trained."""

    def __init__(self, source: ModelSource, tokenizer: PreTrainedTokenizerFast) -> None:
        self.recipe, self.run, self.system = source.recipe, source.run, source.system
        self.chat = Chat(tokenizer, None if source.recipe is None else source.recipe.data.template_date)

    def file(self, path: Path) -> Texts:
        texts = self._texts(SourceBlock(path=str(path)), path.name)
        assert texts is not None
        return texts

    def evaluation(self, tell: Callable[[str], None]) -> Texts | None:
        """The rows that the run evaluates on, where they are more than prompts: those are not what a model writes."""
        if self.recipe is None or not self.recipe.evaluations:
            return None
        first, *_ = self.recipe.evaluations.values()
        try:
            return self._texts(first.data, "the rows that the run evaluates on", only_whole=True)
        except DataError as error:
            tell(f"note: the run's evaluation data cannot be read: {error}")
            return None

    def rollouts(self) -> Texts | None:
        """The run's newest ones."""
        if self.run is None:
            return None
        found: list[TokenIds] = []
        for path in sorted(rollouts_path(self.run, 0).parent.glob("step_*.parquet"), reverse=True):
            try:
                records = read_rollouts(path)
            except RolloutFileError as error:
                raise DataError(f"{error}; or give --calibration FILE") from error
            found += [[*record.prompt_token_ids.tolist(), *record.token_ids.tolist()] for record in records]
            if len(found) >= MOST_TEXTS:
                break
        return Texts(found, "the run's rollouts") if found else None

    def training(self) -> Texts | None:
        return None if self.recipe is None else self._texts(self.recipe.data.train, "the run's training data")

    def _texts(
        self, sources: SourceBlock | Sequence[SourceBlock], origin: str, *, only_whole: bool = False
    ) -> Texts | None:
        """All rows in a random order that is the same every time.

        Args:
            only_whole: Leave out prompts without an answer.
        """
        rows = load_records(sources, 0, self._render)
        chosen = [rows[index].value for index in permutation(len(rows), 0, "texts of a quantised model")]
        # Every one is as likely, and more than are wanted are not tokenised.
        kept = [text for text, is_whole in chosen if is_whole or not only_whole][: 8 * MOST_TEXTS]
        found = [ids.tolist() for ids in self.chat.encode(kept)]
        if long_enough := [ids for ids in found if len(ids) > 1]:
            return Texts(long_enough, origin)
        if only_whole:
            return None
        raise DataError(f"{origin}: no row has two tokens")

    def _render(self, record: Record) -> tuple[Rendered, bool]:
        """The text, and whether it is more than a prompt."""
        if record.text is not None:
            return self.chat.render_text(record.text, complete=True), True
        messages = with_system(record.messages, self.system)
        if messages[-1]["role"] == "assistant":
            return self.chat.render_conversation(messages, None, record.tools), True
        return self.chat.render_prompt(messages, record.tools), False
