"""What the policy wrote, a Parquet file a step: one row a rollout, in the order they were trained."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlflow.checkpoint import naming_the_disk
from rlflow.tracking.episode_columns import episode_columns, episode_of
from rlflow.tracking.rollout_files import step_of
from rlflow.tracking.row_columns import keep_columns
from rlflow.types import Episode, Group, Prompt, Rollout, RolloutEnd

RolloutState = Literal["trained", "masked", "baseline", "filtered", "sampled"]
"""trained; in the batch without loss (unscored, truncated); greedy, for its group's baseline; or in a group that was
replaced; sampled by a stage that trains nothing."""

REWARD_PREFIX = "reward/"
_NEEDED_COLUMNS = (
    "prompt_id",
    "epoch",
    "sample_index",
    "prompt",
    "messages",
    "completion",
    "reward",
    "advantage",
    "policy_version",
    "finish_reason",
    "state",
)
"""Those that files of every version have."""
_TOKEN_COLUMNS = ("prompt_token_ids", "token_ids", "is_sampled", "logprobs", "versions")
_IMAGES = "images"
_EACH_IMAGE = f"{_IMAGES}.list.element"
"""The column's values in Parquet's words: a dictionary holds each picture once, however many rollouts are of it."""
_LARGEST_DICTIONARY = 1 << 30
"""Bytes; beyond it Parquet writes values out."""
_REPEATED_COLUMNS = ["prompt_id", "prompt", "messages", "tools", "opened", "columns", "error", "finish_reason", "state"]
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
    finish_reason: RolloutEnd
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
    step: int = 0
    """By the file's name; 0 where that says none."""
    num_tokens: int = 0
    """How many the policy wrote; known without the tokens themselves."""
    opened: str = ""
    """What the prompt ended with and the completion goes on from, e.g. ``<think>``: rewards saw it in front."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The row's other columns, which reward functions saw; empty in files of an earlier version."""
    inexact_columns: tuple[str, ...] = ()
    """Those of them that were cut short, or are text in place of what rewards saw."""
    episode: Episode | None = None
    """Of a rollout in an environment: what was said and heard in every turn, calls included."""
    tools: list[Any] = field(default_factory=list)
    """Functions that its prompt described."""
    images: tuple[bytes, ...] = ()
    """Encoded pictures of its prompt; empty when they were not asked for."""

    @property
    def num_turns(self) -> int:
        """Completions of the policy."""
        return 1 if self.episode is None else self.episode.num_turns

    @property
    def environment_reward(self) -> float:
        """The environment's own; NaN where there is none, or it failed."""
        return math.nan if self.episode is None else self.episode.reward


class RolloutFileError(ValueError):
    """A rollout file that cannot be read; the message names it and says what to do."""


def rollouts_path(directory: Path, step: int) -> Path:
    """Where a run keeps what was generated for a step, counted from 1."""
    return directory / "rollouts" / f"step_{step:06d}.parquet"


def write_rollouts(
    path: Path, groups: Sequence[Group], advantages: Sequence[np.ndarray], states: Sequence[str]
) -> None:
    """Writes a step's rollouts as Parquet (zstd), under a temporary name first.

    Args:
        path: Its directory exists.
        groups: Scored by the same functions; each has as many rollouts as it has.
        advantages: An array for each group, [G]; NaN where there is none.
        states: Of every rollout, in the order of ``groups``.

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
    kept = [columns for group in groups for columns in [keep_columns(group.prompt.columns)] * len(group.rollouts)]
    behind = [(rollout, rollout.num_prompt_tokens) for rollout in rollouts]
    columns: dict[str, Any] = {
        "prompt_id": [prompt.id for prompt in prompts],
        "epoch": pa.array([group.epoch for group in groups for _ in group.rollouts], pa.int32()),
        "sample_index": pa.array([g for group in groups for g in range(len(group.rollouts))], pa.int32()),
        "prompt": _texts([last_user_text(prompt) for prompt in prompts]),
        "messages": _texts([json.dumps(list(p.messages), ensure_ascii=False, default=str) for p in prompts]),
        "opened": _texts([prompt.opened for prompt in prompts]),
        "columns": _texts([columns.text for columns in kept]),
        "inexact_columns": pa.array([columns.inexact for columns in kept], pa.list_(pa.string())),
        "completion": _texts([rollout.text for rollout in rollouts]),
        "reward": _numbers([rollout.reward for rollout in rollouts]),
    }
    for name in rollouts[0].rewards if rollouts else ():
        columns[f"{REWARD_PREFIX}{name}"] = _numbers([rollout.rewards[name] for rollout in rollouts])
    columns |= episode_columns([rollout.episode for rollout in rollouts])
    if any(prompt.tools for prompt in prompts):
        columns["tools"] = _texts([json.dumps(list(prompt.tools), ensure_ascii=False) for prompt in prompts])
    if any(prompt.images for prompt in prompts):
        columns[_IMAGES] = pa.array([list(prompt.images) for prompt in prompts], pa.list_(pa.binary()))
    columns |= {
        "error": _texts([rollout.error or None for rollout in rollouts]),
        "advantage": _numbers(flat_advantages),
        "policy_version": pa.array([_oldest(rollout) for rollout in rollouts], pa.int64()),
        "finish_reason": pa.array([rollout.finish_reason for rollout in rollouts], pa.string()).dictionary_encode(),
        "state": pa.array(states, pa.string()).dictionary_encode(),
        "prompt_token_ids": _ragged([rollout.token_ids[:size] for rollout, size in behind], np.int32),
        "token_ids": _ragged([rollout.token_ids[size:] for rollout, size in behind], np.int32),
        "is_sampled": _ragged([rollout.is_sampled[size:] for rollout, size in behind], np.bool_),
        "logprobs": _ragged([rollout.logprobs[size:] for rollout, size in behind], np.float32),
        "versions": _ragged([rollout.versions[size:] for rollout, size in behind], np.int32),
    }
    _publish(pa.table(columns), path)


def read_rollouts(
    path: Path, *, tokens: bool = True, images: bool = False, rows: slice = slice(None)
) -> list[RolloutRecord]:
    """Reads a file back.

    Args:
        tokens: Whether token ids and logprobs are wanted; without them reading is several times faster.
        images: Whether pictures are wanted.
        rows: Which rows are wanted; others are not made into records.

    Raises:
        RolloutFileError: The file is damaged, or of a version that this one does not read.
    """
    names = column_names(path)
    if missing := [name for name in _NEEDED_COLUMNS if name not in names]:
        raise RolloutFileError(
            f"{path} has no column {missing[0]!r}: it is no rollout file of this version of rlflow. "
            "Read it with pyarrow or pandas, or with the version that wrote it"
        )
    lengths = _num_tokens(path, "is_sampled" if "is_sampled" in names else "token_ids", names)[rows]
    unwanted = {*(() if tokens else _TOKEN_COLUMNS), *(() if images else (_IMAGES,))}
    table = _read(path, [name for name in names if name not in unwanted])
    start, stop, _ = rows.indices(table.num_rows)
    table = table.slice(start, max(0, stop - start))
    of_tokens = [name for name in table.column_names if name in _TOKEN_COLUMNS]
    arrays: dict[str, Sequence[Any]] = {name: _arrays(table[name]) for name in of_tokens}
    if _IMAGES in table.column_names:
        of_tokens.append(_IMAGES)
        arrays[_IMAGES] = _shared(table[_IMAGES])
    step = step_of(path)
    return [
        _record(row | {name: arrays[name][i] for name in of_tokens}, step, lengths[i], path)
        for i, row in enumerate(table.drop_columns(of_tokens).to_pylist())
    ]


def read_errors(path: Path) -> list[str]:
    """Of every rollout of a file on which a reward function failed: why.

    Raises:
        RolloutFileError: The file is damaged.
    """
    if "error" not in column_names(path):
        return []
    return [error for error in _read(path, ["error"])["error"].to_pylist() if error]


def num_rollouts(path: Path) -> int:
    """How many rows a file has.

    Raises:
        RolloutFileError: The file is damaged.
    """
    return _open(path).metadata.num_rows


def column_names(path: Path) -> list[str]:
    """The columns of a file.

    Raises:
        RolloutFileError: The file is damaged.
    """
    return _open(path).schema_arrow.names


def last_user_text(prompt: Prompt) -> str:
    """Text of the prompt's last user message; images and other parts are named by their type."""
    for message in reversed(prompt.messages):
        if message["role"] == "user":
            content = message["content"]
            if isinstance(content, str):
                return content
            return "".join(part["text"] if part["type"] == "text" else f"[{part['type']}]" for part in content)
    return ""


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error


def _read(path: Path, names: Sequence[str]) -> pa.Table:
    try:
        with _open(path) as file:
            return file.read(columns=list(names))
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> RolloutFileError:
    if not path.exists():
        return RolloutFileError(f"{path} is not there (any more)")
    reason = (str(error).splitlines() or ["unknown"])[0].rstrip(".")
    return RolloutFileError(
        f"{path} cannot be read, it is damaged or cut short ({reason}): remove it, or name another step"
    )


def _num_tokens(path: Path, name: str, names: Sequence[str]) -> list[int]:
    """Of every rollout, how many tokens the policy wrote."""
    if name not in names:
        return [0] * num_rollouts(path)
    lists = _read(path, [name])[name].combine_chunks()
    offsets = lists.offsets.to_numpy()
    if name == "token_ids":
        return np.diff(offsets).tolist()
    flat = lists.values.to_numpy(zero_copy_only=False).astype(np.int64)
    sums = np.concatenate([[0], np.cumsum(flat)])
    return (sums[offsets[1:]] - sums[offsets[:-1]]).tolist()


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The rows of a list column, without a Python object a token."""
    lists: Any = column.combine_chunks()
    offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy(zero_copy_only=False)
    return [values[start:end] for start, end in pairwise(offsets)]


def _shared(column: pa.ChunkedArray) -> list[tuple[bytes, ...]]:
    """The pictures of each row; rows of the same picture share its bytes."""
    distinct: dict[bytes, bytes] = {}
    return [tuple(distinct.setdefault(data, data) for data in row.as_py() or ()) for row in column]


def _record(row: Mapping[str, Any], step: int, num_tokens: int, path: Path) -> RolloutRecord:
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
        messages=_json(row["messages"], path),
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
        step=step,
        num_tokens=num_tokens,
        opened=row.get("opened", ""),
        columns=_json(row.get("columns", "{}"), path),
        inexact_columns=tuple(row.get("inexact_columns", ())),
        episode=episode_of(row),
        tools=_json(row.get("tools") or "[]", path),
        images=row.get(_IMAGES, ()),
    )


def _json(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RolloutFileError(f"{path} has a row that is no JSON ({error}): rlflow did not write it so") from error


def _oldest(rollout: Rollout) -> int:
    return int(rollout.versions[rollout.is_sampled].min())


def _texts(values: Sequence[str | None]) -> pa.Array:
    """Strings; half of a surrogate pair, which UTF-8 cannot hold, becomes a question mark."""
    return pa.array([value and value.encode(errors="replace").decode() for value in values], pa.string())


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
        "use_dictionary": [*_REPEATED_COLUMNS, *([_EACH_IMAGE] if _IMAGES in table.column_names else [])],
        "dictionary_pagesize_limit": _LARGEST_DICTIONARY,
        "write_statistics": [name for name in table.column_names if name not in (*_TOKEN_COLUMNS, _IMAGES)],
    }
    try:
        with naming_the_disk(path, table.nbytes):
            pq.write_table(table, temporary, compression="zstd", **of_columns)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
