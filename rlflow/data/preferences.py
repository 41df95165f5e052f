"""Rows to pairs (DPO and its kin, reward models) and to labelled answers (KTO)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlflow.data.audios import NO_CLASSIFIER
from rlflow.data.chat import Chat
from rlflow.data.encoding import Rendered
from rlflow.data.errors import DataError, RowError, Rows, listing
from rlflow.data.examples import Example, encode_rows, logged_sequences
from rlflow.data.formats import Record, with_system
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.image_rows import with_images
from rlflow.data.records import load_records
from rlflow.recipe.data_blocks import DataBlock
from rlflow.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt. Their masks hold what is theirs alone: every assistant turn after they part."""

    id: str
    chosen: Example
    rejected: Example
    margin: float
    """By how much the chosen one should win: the column ``margin``, or 0."""

    @property
    def images(self) -> tuple[bytes, ...]:
        """Of both sides."""
        return (*self.chosen.images, *self.rejected.images)


@dataclass(frozen=True, slots=True)
class Labelled:
    """An answer, and whether it is a desirable one."""

    id: str
    example: Example
    label: bool

    @property
    def images(self) -> tuple[bytes, ...]:
        return self.example.images


def load_pairs(
    data: DataBlock,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    vision: ImageProcessor | None = None,
    *,
    for_reward_model: bool = False,
) -> Rows[Pair]:
    """The preference pairs of ``data.train``.

    A pair of which either side is overlong is overlong. One whose sides are the same tokens once they are rendered and
    cut teaches nothing and is left out.

    Args:
        data: the recipe's.
        tokenizer: the policy's, or the reward model's.
        seed: the run's.
        vision: of a model that takes pictures.
        for_reward_model: the answers are read, not written, and may have a ``margin``.

    Raises:
        DataError: the rows have a ``margin`` that no loss would look at, a source or too many of its rows cannot be
            used (no rejected answer, the same as the chosen one, or one to another prompt), rows are overlong and
            must not be, no pair is left, or the reward model is to hear.
    """
    if for_reward_model and vision is not None and vision.takes_audios:
        raise DataError(f"the model hears, and {NO_CLASSIFIER}")
    chat = Chat(tokenizer, data.template_date, vision)
    rows = load_records(
        data.train, seed, lambda record: _render_pair(record, data, chat, for_reward_model), vision=vision
    )
    encoded = encode_rows(rows, lambda value: value[:2], data, chat)
    pairs: Rows[Pair] = Rows(skipped=encoded.skipped, notes=encoded.notes)
    for row, (chosen, rejected) in encoded:
        if np.array_equal(chosen.token_ids, rejected.token_ids) and chosen.images == rejected.images:
            reason = f"the chosen and the rejected answer are identical in their {len(chosen.token_ids):,} tokens"
            pairs.skipped.append(row.bad(reason))
        else:
            pairs.append(Pair(row.id, chosen, rejected, margin=row.value[2]))
    if not pairs:
        raise DataError(f"no pair is left:{listing(pairs.skipped)}\nRaise data.max_tokens, or give other pairs.")
    return pairs


def load_labelled(
    data: DataBlock, tokenizer: PreTrainedTokenizerFast, seed: int, vision: ImageProcessor | None = None
) -> Rows[Labelled]:
    """The labelled answers of ``data.train``; the last assistant turn is the one that is judged, and of a rollout that
    was logged all that the policy wrote.

    Raises:
        DataError: as ``load_pairs``, or all labels are the same: KTO needs both kinds.
    """
    chat = Chat(tokenizer, data.template_date, vision)
    rows = load_records(
        data.train, seed, lambda record: _render_labelled(record, data, chat), judged=True, vision=vision
    )
    encoded = encode_rows(rows, lambda value: value[:1], data, chat)
    labelled = Rows(
        [Labelled(row.id, example, label=row.value[1]) for row, (example,) in encoded], encoded.skipped, encoded.notes
    )
    labels = {item.label for item in labelled}
    if len(labels) < 2:
        raise DataError(
            f"all {len(labelled)} rows have the label {str(labels.pop()).lower()}. KTO compares desirable answers with "
            "undesirable ones: give rows of both kinds, or use sft."
        )
    return labelled


def _render_pair(
    record: Record, data: DataBlock, chat: Chat, for_reward_model: bool
) -> tuple[Rendered, Rendered, float]:
    if record.rejected is None:
        pairs = ": rlflow inspect RUN --pairs FILE.jsonl makes pairs of rollouts" if record.logged else ""
        raise RowError(f"it has no rejected answer{pairs}")
    chosen, rejected = record.messages, record.rejected
    if list(chosen) == list(rejected) and record.images == record.rejected_images:
        raise RowError("the chosen and the rejected answer are identical")
    shared = _num_shared(chosen, rejected)
    if not any(message["role"] == "user" for message in chosen[:shared]):
        raise RowError("the chosen and the rejected answer are to different prompts")
    margin = _margin(record.columns)
    if margin and not for_reward_model:
        raise DataError(
            "the rows have a column `margin`, which only the loss of a reward_model looks at. Give it another name in "
            "the source's `columns`, e.g. columns: {unused: margin}."
        )
    if shared == len(chosen) == len(rejected):
        # Their pictures alone are others.
        shared -= 1
    first, second = (
        _render_answers(side, images, shared, record, data, chat, written=not for_reward_model)
        for side, images in ((chosen, record.images), (rejected, record.rejected_images))
    )
    return first, second, margin


def _render_labelled(record: Record, data: DataBlock, chat: Chat) -> tuple[Rendered, bool]:
    if record.label is None:
        raise RowError("it has no `label`: say which rows are desirable, e.g. label: reward > 0.5 in the source")
    if record.logged is None:
        first = len(record.messages) - 1
    elif sequences := logged_sequences(record, record.logged, data, chat):
        if len(sequences) > 1:
            raise RowError(f"a rollout of {len(sequences)} sequences, as its template rewrites turns: one is judged")
        return sequences[0], record.label
    else:
        first = record.logged.num_prompt_messages
    rendered = _render_answers(record.messages, record.images, first, record, data, chat, written=True)
    return rendered, record.label


def _render_answers(
    messages: Sequence[Message],
    images: Sequence[bytes],
    num_prompt: int,
    record: Record,
    data: DataBlock,
    chat: Chat,
    *,
    written: bool,
) -> Rendered:
    """The conversation, with the assistant turns from ``messages[num_prompt]`` on trained, unless their ``loss`` is
    false."""
    if messages[-1]["role"] != "assistant" or len(messages) <= num_prompt:
        raise RowError("it does not end with an assistant's answer")
    whole = with_system(messages, data.system)
    first = num_prompt + len(whole) - len(messages)
    answers = [index for index in range(first, len(whole)) if whole[index]["role"] == "assistant"]
    turns = [index for index in answers if whole[index].get("loss", True)]
    if not turns:
        raise RowError("`loss` is false in every assistant message")
    rendered = chat.render_conversation(whole, turns, record.tools, written=written)
    return with_images(rendered, whole, images, chat)


def _num_shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    count = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        count += 1
    return count


def _margin(columns: dict[str, Any]) -> float:
    value = columns.get("margin")
    try:
        margin = 0.0 if value in (None, "") else float(value)
    except (TypeError, ValueError):
        margin = math.nan
    if not math.isfinite(margin):
        raise RowError(f"`margin` is {value!r}, not a finite number")
    return margin
