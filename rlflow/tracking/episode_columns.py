"""The columns of a rollout file that only rollouts in an environment have, and back.

turns                what follows the prompt, as chat messages: JSON, a row can be trained as it is
began_with           what the environment began with in the place of the row's messages: JSON, or null
num_turns, environment_reward, environment_state (JSON), environment_counts (JSON), environment_error
sequence_starts      where the rollout's sequences begin, counted from its prompt's first token
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from rlflow.types import Episode


def episode_columns(episodes: Sequence[Episode | None]) -> dict[str, Any]:
    """The columns of a file; none where no rollout was in an environment."""
    known = [episode for episode in episodes if episode is not None]
    if not known:
        return {}
    assert len(known) == len(episodes), "some rollouts were in an environment, and others were not"
    rewards = [None if math.isnan(episode.reward) else episode.reward for episode in known]
    return {
        "turns": _json(episode.messages for episode in known),
        "began_with": _json(episode.prompt for episode in known),
        "num_turns": pa.array([episode.num_turns for episode in known], pa.int32()),
        "environment_reward": pa.array(rewards, pa.float32()),
        "environment_state": _json(episode.state for episode in known),
        "environment_counts": _json(dict(episode.counts) for episode in known),
        "environment_error": pa.array([episode.error or None for episode in known], pa.string()),
        "sequence_starts": pa.array([list(episode.starts) for episode in known], pa.list_(pa.int32())),
    }


def episode_of(row: Mapping[str, Any]) -> Episode | None:
    """The episode of a row, as it was but for the time it took."""
    if row.get("turns") is None:
        return None
    began_with, reward = json.loads(row["began_with"]), row["environment_reward"]
    return Episode(
        messages=tuple(json.loads(row["turns"])),
        prompt=None if began_with is None else tuple(began_with),
        starts=tuple(row["sequence_starts"]),
        num_turns=row["num_turns"],
        reward=math.nan if reward is None else reward,
        state=json.loads(row["environment_state"]),
        error=row["environment_error"] or "",
        counts=json.loads(row["environment_counts"]),
    )


def _json(values: Any) -> pa.Array:
    texts = [json.dumps(value, ensure_ascii=False, default=str) for value in values]
    return pa.array([text.encode(errors="replace").decode() for text in texts], pa.string())
