"""Which of a model's answers are worth learning from: the good ones of each prompt, or its better and worse ones.

rollouts of all prompts -- scored, whole, said once --> `where` --> at_most of a prompt --> rows of SFT or DPO
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlflow.data.logged import conversation_of
from rlflow.data.sources import CONVERSATION_COLUMNS
from rlflow.data.videos import media_columns
from rlflow.recipe.sample_blocks import KeepBlock
from rlflow.tracking.filters import COLUMN_PREFIX, COUNT_PREFIX, OWN_NAMES, Expression, filter_records
from rlflow.tracking.rollouts import REWARD_PREFIX, RolloutRecord

_OF_THE_ROW = {"id", *CONVERSATION_COLUMNS}
"""Columns of the row that was answered, which its answers do not have: its name, and what it answered itself."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of some rollouts."""

    rows: list[dict[str, Any]]
    """Of SFT or DPO, in the order of the prompts."""
    num_answers: int
    """Rollouts there were."""
    num_usable: int
    """Those that were scored, not cut, and not said before in answer to the same prompt."""
    num_good: int
    """Those of them that fulfil the condition."""

    @property
    def account(self) -> str:
        """What became of the answers."""
        return (
            f"{self.num_answers:,} answers, {self.num_usable:,} of them scored, whole and said once, {self.num_good:,} "
            f"good: {len(self.rows):,} rows"
        )


def keep_answers(records: Sequence[RolloutRecord], keep: KeepBlock) -> Kept:
    """Chooses among the rollouts of whole prompts.

    Raises:
        FilterError: The condition cannot be read, or evaluated.
    """
    usable = _usable(records)
    good = usable if keep.where is None else filter_records(usable, keep.where)
    good_of, usable_of = _by_prompt(good), _by_prompt(usable)
    rows: list[dict[str, Any]] = []
    for prompt, answers in good_of.items():
        if len(answers) < keep.at_least:
            continue
        # Sorting keeps those of the same reward in the order in which they were drawn.
        best = sorted(answers, key=lambda record: -record.reward)
        if keep.form == "answers":
            rows += [chat_row(record) for record in best[: keep.at_most]]
            continue
        worst = sorted(usable_of[prompt], key=lambda record: record.reward)
        pairs = zip(best[: keep.at_most or 1], worst, strict=False)
        rows += [pair_row(better, worse) for better, worse in pairs if better.reward > worse.reward]
    return Kept(rows, len(records), len(usable), len(good))


def chat_row(record: RolloutRecord) -> dict[str, Any]:
    """A rollout as a row that SFT reads: its conversation and the data's columns, as JSON can hold them."""
    columns = {name: value for name, value in record.columns.items() if name not in _OF_THE_ROW}
    row = {**columns, "messages": conversation_of(record), "prompt_id": record.prompt_id, "step": record.step}
    return row | _shown_with(record) | {"reward": None if math.isnan(record.reward) else record.reward}


def pair_row(better: RolloutRecord, worse: RolloutRecord) -> dict[str, Any]:
    """Two rollouts of a prompt as a row that DPO reads."""
    return {
        "chosen_messages": conversation_of(better),
        "rejected_messages": conversation_of(worse),
        **_shown_with(better),
        **{"prompt_id": better.prompt_id, "step": better.step},
        **{"chosen_reward": better.reward, "rejected_reward": worse.reward},
    }


def _shown_with(record: RolloutRecord) -> dict[str, Any]:
    """The columns of its tools, and of its pictures and videos, as data URIs."""
    tools = {"tools": record.tools} if record.tools else {}
    return tools | media_columns(record.images)


def require_condition(keep: KeepBlock, rewards: Iterable[str], columns: Iterable[str]) -> None:
    """What can be told of the condition before there is an answer.

    Args:
        rewards: The labels of the reward functions.
        columns: Those of the prompts.

    Raises:
        FilterError: It cannot be read, or names what no answer has.
    """
    if keep.where is not None:
        of_rewards = [f"{REWARD_PREFIX}{name}" for name in rewards]
        own = list(dict.fromkeys(columns))
        # What an environment counts is known when it has.
        own += re.findall(rf"{COUNT_PREFIX}[\w.]+", keep.where)
        Expression(keep.where, [*OWN_NAMES, *of_rewards, *own, *(f"{COLUMN_PREFIX}{name}" for name in own)])


def _usable(records: Iterable[RolloutRecord]) -> list[RolloutRecord]:
    """Those that were scored and not cut, each answer to a prompt once."""
    found: dict[tuple[str, str], RolloutRecord] = {}
    for record in records:
        if record.finish_reason != "length" and not math.isnan(record.reward) and says_something(record):
            found.setdefault((record.prompt_id, said_in(record)), record)
    return list(found.values())


def said_in(record: RolloutRecord) -> str:
    """All that is behind the prompt, in one text: of an episode every turn."""
    if record.episode is None:
        return record.completion
    return json.dumps([record.episode.prompt, record.episode.messages], default=str)


def trains_something(record: RolloutRecord) -> bool:
    """Whether a turn of the model was not cut."""
    behind = conversation_of(record)[-1 if record.episode is None else -len(record.episode.messages) :]
    return any(message["role"] == "assistant" and message.get("loss", True) for message in behind)


def says_something(record: RolloutRecord) -> bool:
    """Whether every turn of the model has a text or calls a function."""
    if record.episode is None:
        return bool(record.completion.strip())
    turns = [message for message in record.episode.messages if message["role"] == "assistant"]
    return all(message.get("tool_calls") or str(message.get("content") or "").strip() for message in turns)


def _by_prompt(records: Iterable[RolloutRecord]) -> dict[str, list[RolloutRecord]]:
    groups: defaultdict[str, list[RolloutRecord]] = defaultdict(list)
    for record in records:
        groups[record.prompt_id].append(record)
    return groups
