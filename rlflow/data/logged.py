"""A run's rollouts as rows: its ``rollouts`` directory, or one file of it, trains as it is.

    runs/NAME/rollouts/step_000012.parquet --read_logged--> conversations, each with the tokens that the policy had

With the same tokenizer and template the tokens themselves are trained, those that were sampled. For another model the
conversation is rendered again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlflow.data.errors import DataError
from rlflow.data.video_archive import is_video
from rlflow.tracking.rollout_files import rollout_files
from rlflow.types import Message

if TYPE_CHECKING:
    from rlflow.tracking.rollouts import RolloutRecord

TOKENS = "logged_tokens"
"""The column that has the tokens."""


@dataclass(frozen=True, slots=True)
class LoggedTokens:
    """A rollout's tokens."""

    prompt: np.ndarray
    """int32 [P]."""
    sequences: tuple[tuple[np.ndarray, np.ndarray], ...]
    """Token ids int32 [T] and which were sampled bool [T] of each, up to the last that was."""
    num_prompt_messages: int


def logged_files(path: Path) -> list[Path]:
    """The rollout files of a run's directory, of its ``rollouts``, or the file itself; none where it is something
    else."""
    if path.is_dir():
        return list(rollout_files(path.parent if path.name == "rollouts" else path).values())
    return [path] if re.fullmatch(r"step_\d{6,}\.parquet", path.name) and path.parent.name == "rollouts" else []


def read_logged(
    files: Sequence[Path], where: str | None, label: str | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row number from 1 in all files, row) of the rollouts that were scored and fulfil a condition.

    Args:
        where: The condition.
        label: Another, which says which of them are desirable.

    Raises:
        DataError: A file cannot be read, or a condition is none.
    """
    # These load pyarrow.
    from rlflow.tracking.filters import filter_records, judge_records
    from rlflow.tracking.rollouts import RolloutFileError, read_rollouts

    number = 0
    for file in files:
        try:
            records = read_rollouts(file, images=True)
        except RolloutFileError as error:
            raise DataError(str(error)) from error
        numbered = {id(record): index for index, record in enumerate(records, number + 1)}
        number += len(records)
        scored = [record for record in records if not math.isnan(record.reward)]
        chosen = filter_records(scored, where) if where else scored
        labels = [{"label": judged} for judged in judge_records(chosen, label)] if label else [{}] * len(chosen)
        for record, judged in zip(chosen, labels, strict=True):
            yield numbered[id(record)], _row(record) | judged


def conversation_of(record: RolloutRecord) -> list[Message]:
    """The prompt's messages and what came behind: the completion as the assistant's, what the prompt had opened
    (``<think>``) in front of it, or all turns of an episode. A turn that was cut is not to be trained."""
    if record.episode is not None:
        messages = [*_prompt_of(record), *record.episode.messages]
    else:
        messages = [*record.messages, {"role": "assistant", "content": record.opened + record.completion}]
    if record.finish_reason == "length" and messages[-1]["role"] == "assistant":
        messages[-1] = {**messages[-1], "loss": False}
    return messages


def _prompt_of(record: RolloutRecord) -> Sequence[Message]:
    return record.messages if record.episode is None else record.episode.prompt or record.messages


def _row(record: RolloutRecord) -> dict[str, Any]:
    return {
        **record.columns,
        **{"prompt_id": record.prompt_id, "step": record.step, "reward": record.reward},
        "messages": conversation_of(record),
        "tools": record.tools,
        **{name: own for name, own in _seen(record).items() if own},
        TOKENS: _tokens(record),
    }


def _seen(record: RolloutRecord) -> dict[str, list[bytes]]:
    return {
        "images": [data for data in record.images if not is_video(data)],
        "videos": [data for data in record.images if is_video(data)],
    }


def _tokens(record: RolloutRecord) -> LoggedTokens:
    token_ids = np.concatenate([record.prompt_token_ids, record.token_ids])
    is_sampled = np.concatenate([np.zeros(len(record.prompt_token_ids), bool), record.is_sampled])
    starts = (0,) if record.episode is None else record.episode.starts
    sequences = []
    for start, end in zip(starts, [*starts[1:], len(token_ids)], strict=True):
        sampled = np.flatnonzero(is_sampled[start:end])
        if len(sampled):
            upto = slice(start, start + int(sampled[-1]) + 1)
            sequences.append((token_ids[upto], is_sampled[upto]))
    return LoggedTokens(record.prompt_token_ids, tuple(sequences), len(_prompt_of(record)))
