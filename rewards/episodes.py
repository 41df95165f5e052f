"""What reward functions get of rollouts in an environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlflow.types import Episode


def last_said(episode: Episode) -> str:
    """What the policy said last: the answer that is judged where a function takes text."""
    said = [message["content"] for message in episode.messages if message["role"] == "assistant"]
    return said[-1] if said else ""


def episode_columns(episodes: Sequence[Episode]) -> dict[str, list[Any]]:
    """What reward functions get of rollouts in an environment, by name."""
    calls = [[call for message in episode.messages for call in message.get("tool_calls", ())] for episode in episodes]
    return {
        "turns": [list(episode.messages) for episode in episodes],
        "tool_calls": calls,
        "num_turns": [episode.num_turns for episode in episodes],
        "environment_reward": [episode.reward for episode in episodes],
        "environment_state": [episode.state for episode in episodes],
    }


EXAMPLE = {name: values[0] for name, values in episode_columns([Episode(())]).items()}
"""Of an episode in which nothing was said: the names, and values of their kind."""
