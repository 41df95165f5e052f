"""What the policy wrote, a Parquet file a step: one row a rollout, in the order they were trained."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlflow.checkpoint import naming_the_disk
from rlflow.types import FinishReason, Group, Prompt, Rollout

RolloutState = Literal["trained", "masked", "filtered"]
"""trained; in the batch without loss (unscored, truncated); or in a group that was replaced."""

REWARD_PREFIX = "reward/"
_TOKEN_COLUMNS = ("prompt_token_ids", "token_ids", "is_sampled", "logprobs", "versions")
_REPEATED_COLUMNS = ["prompt_id", "prompt", "messages", "error", "finish_reason", "state"]
"""Those that a dictionary makes smaller. To look every token up in one costs more than all other writing."""


@dataclass(frozen=True, slots=True)
class RolloutRecord:
    """One row of a file."""

    prompt_id: str
    epoch: int
    sample_index: int
    """Which of its group's rollouts it is."""
    prompt: str
    """Text of the last user message."""
    messages: list[dict[str, Any]]
    """The whole prompt."""
    completion: str
    """What the policy wrote, special tokens included; a tag that the prompt opened is not among it."""
    reward: float
    """Weighted sum; NaN when unscored."""
    rewards: dict[str, float]
    """By function; NaN where it abstained or failed."""
    error: str
    """Which reward functions failed on it, and why; empty when none did."""
    advantage: float
    policy_version: int
    """The oldest that sampled a token of it."""
    finish_reason: FinishReason
    state: RolloutState
    prompt_token_ids: np.ndarray
    """int32 [P]; empty when tokens were not asked for."""
    token_ids: np.ndarray
    """int32 [C]: all that follows the prompt."""
    is_sampled: np.ndarray
    """bool [C]: the policy wrote it."""
    logprobs: np.ndarray
    """float32 [C]."""
    versions: np.ndarray
    """int32 [C]: of the weights that sampled it; -1 where it was not sampled."""


def write_rollouts(
    path: Path, groups: Sequence[Group], advantages: Sequence[np.ndarray], states: Sequence[str]
) -> None:
    """Writes a step's rollouts as Parquet (zstd), under a temporary name first.

    Args:
        path: Its directory exists.
        groups: Scored by the same functions; each has as many rollouts as it has.
        advantages: An array for each group, [G]; NaN where there is none.
        states: ``trained``, ``masked`` or ``filtered`` of every rollout, in the order of ``groups``.

    Raises:
        ValueError: Lengths disagree.
        DiskError: Writing failed; nothing is left of the attempt.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    flat_advantages = np.concatenate([np.asarray(a, dtype=np.float32) for a in advantages] or [np.zeros(0)])
    if not len(rollouts) == len(flat_advantages) == len(states):
        counts = f"{len(rollouts)} rollouts, {len(flat_advantages)} advantages, {len(states)} states"
        raise ValueError(f"{path.name}: {counts} where each rollout needs one of each")
    prompts = [group.prompt for group in groups for _ in group.rollouts]
    behind = [(rollout, len(prompt.token_ids)) for rollout, prompt in zip(rollouts, prompts, strict=True)]
    columns: dict[str, Any] = {
        "prompt_id": [prompt.id for prompt in prompts],
        "epoch": pa.array([group.epoch for group in groups for _ in group.rollouts], pa.int32()),
        "sample_index": pa.array([g for group in groups for g in range(len(group.rollouts))], pa.int32()),
        "prompt": _texts([last_user_text(prompt) for prompt in prompts]),
        "messages": _texts([json.dumps(list(p.messages), ensure_ascii=False, default=str) for p in prompts]),
        "completion": _texts([rollout.text for rollout in rollouts]),
        "reward": _numbers([rollout.reward for rollout in rollouts]),
    }
    for name in rollouts[0].rewards if rollouts else ():
        columns[f"{REWARD_PREFIX}{name}"] = _numbers([rollout.rewards[name] for rollout in rollouts])
    columns |= {
        "error": pa.array([rollout.error or None for rollout in rollouts], pa.string()),
        "advantage": _numbers(flat_advantages),
        "policy_version": pa.array([_oldest(rollout) for rollout in rollouts], pa.int64()),
        "finish_reason": pa.array([rollout.finish_reason for rollout in rollouts], pa.string()).dictionary_encode(),
        "state": pa.array(states, pa.string()).dictionary_encode(),
        "prompt_token_ids": _ragged([prompt.token_ids for prompt in prompts], np.int32),
        "token_ids": _ragged([rollout.token_ids[size:] for rollout, size in behind], np.int32),
        "is_sampled": _ragged([rollout.is_sampled[size:] for rollout, size in behind], np.bool_),
        "logprobs": _ragged([rollout.logprobs[size:] for rollout, size in behind], np.float32),
        "versions": _ragged([rollout.versions[size:] for rollout, size in behind], np.int32),
    }
    _publish(pa.table(columns), path)


def read_rollouts(path: Path, *, tokens: bool = True) -> list[RolloutRecord]:
    """Reads a file back.

    Args:
        tokens: Whether token ids and logprobs are wanted; without them reading is several times faster.
    """
    file = pq.ParquetFile(path)
    names = [name for name in file.schema_arrow.names if tokens or name not in _TOKEN_COLUMNS]
    rows = file.read(columns=names).to_pylist()
    return [_record(row) for row in rows]


def read_errors(path: Path) -> list[str]:
    """Of every rollout of a file on which a reward function failed: why."""
    file = pq.ParquetFile(path)
    if "error" not in file.schema_arrow.names:
        return []
    return [error for error in file.read(columns=["error"])["error"].to_pylist() if error]


def last_user_text(prompt: Prompt) -> str:
    """Text of the prompt's last user message; images and other parts are named by their type."""
    for message in reversed(prompt.messages):
        if message["role"] == "user":
            content = message["content"]
            if isinstance(content, str):
                return content
            return "".join(part["text"] if part["type"] == "text" else f"[{part['type']}]" for part in content)
    return ""


def _record(row: Mapping[str, Any]) -> RolloutRecord:
    tokens: dict[str, Any] = {name: row.get(name, ()) for name in _TOKEN_COLUMNS}
    # Files of an earlier version have completions of one turn and one version.
    size = len(tokens["token_ids"])
    is_sampled = row.get("is_sampled", [True] * size)
    versions = row.get("versions", [row["policy_version"]] * size)
    return RolloutRecord(
        prompt_id=row["prompt_id"],
        epoch=row["epoch"],
        sample_index=row["sample_index"],
        prompt=row["prompt"],
        messages=json.loads(row["messages"]),
        completion=row["completion"],
        reward=_or_nan(row["reward"]),
        rewards={
            name.removeprefix(REWARD_PREFIX): _or_nan(value)
            for name, value in row.items()
            if name.startswith(REWARD_PREFIX)
        },
        error=row.get("error") or "",
        advantage=_or_nan(row["advantage"]),
        policy_version=row["policy_version"],
        finish_reason=row["finish_reason"],
        state=row["state"],
        prompt_token_ids=np.array(tokens["prompt_token_ids"], dtype=np.int32),
        token_ids=np.array(tokens["token_ids"], dtype=np.int32),
        is_sampled=np.array(is_sampled, dtype=bool),
        versions=np.array(versions, dtype=np.int32),
        logprobs=np.array(tokens["logprobs"], dtype=np.float32),
    )


def _oldest(rollout: Rollout) -> int:
    return int(rollout.versions[rollout.is_sampled].min())


def _texts(values: Sequence[str]) -> pa.Array:
    """Strings; half of a surrogate pair, which UTF-8 cannot hold, becomes a question mark."""
    return pa.array([value.encode(errors="replace").decode() for value in values], pa.string())


def _numbers(values: Sequence[float] | np.ndarray) -> pa.Array:
    """float32, with null for NaN: SQL and data frames then leave it out of their means."""
    array = np.asarray(values, dtype=np.float32)
    return pa.array(array, mask=np.isnan(array))


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _ragged(arrays: Sequence[np.ndarray], dtype: type[np.generic]) -> pa.Array:
    """A list column from arrays of different lengths, without a Python object a token."""
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    flat = np.concatenate([np.asarray(array, dtype=dtype) for array in arrays] or [np.zeros(0, dtype=dtype)])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def _publish(table: pa.Table, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    # pyarrow's annotations know of no lists.
    of_columns: dict[str, Any] = {
        "use_dictionary": _REPEATED_COLUMNS,
        "write_statistics": [name for name in table.column_names if name not in _TOKEN_COLUMNS],
    }
    try:
        with naming_the_disk(path, table.nbytes):
            pq.write_table(table, temporary, compression="zstd", **of_columns)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
