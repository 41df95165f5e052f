"""What the policy wrote in a step, for trackers that show it. Nothing is computed before one of them asks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlflow.tracking.rollouts import REWARD_PREFIX, last_user_text
from rlflow.types import Prompt, Rollout

LONGEST_TEXT = 4000
"""Characters of a text in a table of samples."""
NUM_BINS = 32


@dataclass(frozen=True, slots=True)
class Episode:
    """One rollout, and what it was worth."""

    prompt: Prompt
    rollout: Rollout
    advantage: float
    """Mean over its tokens; NaN where there is none."""
    state: str
    """``trained``, ``masked`` or ``filtered``."""

    @property
    def num_tokens(self) -> int:
        """Those that the policy sampled."""
        return int(self.rollout.is_sampled.sum())

    def row(self, step: int) -> dict[str, Any]:
        """A row of a table: numbers that are not finite are None, texts are not longer than `LONGEST_TEXT`."""
        rollout = self.rollout
        return {
            "step": step,
            "prompt": shortened(last_user_text(self.prompt), LONGEST_TEXT),
            "completion": shortened(rollout.text, LONGEST_TEXT),
            "reward": _finite(rollout.reward),
            **{f"{REWARD_PREFIX}{name}": _finite(value) for name, value in rollout.rewards.items()},
            "advantage": _finite(self.advantage),
            "tokens": self.num_tokens,
            "finish_reason": rollout.finish_reason,
            "state": self.state,
            "prompt_id": self.prompt.id,
        }


@dataclass(frozen=True, slots=True)
class Episodes:
    """The rollouts of one step."""

    step: int
    """Counted from 1."""
    episodes: Sequence[Episode]

    def by_reward(self) -> list[Episode]:
        """Those that were scored, the best first; of equals the first."""
        scored = [episode for episode in self.episodes if math.isfinite(episode.rollout.reward)]
        return sorted(scored, key=lambda episode: -episode.rollout.reward)

    def samples(self, most: int) -> list[dict[str, Any]]:
        """At most so many rows of a table, from the best to the worst at even distances."""
        ranked = self.by_reward() or list(self.episodes)
        count = min(most, len(ranked))
        chosen = sorted({round(i * (len(ranked) - 1) / max(1, count - 1)) for i in range(count)})
        return [ranked[index].row(self.step) for index in chosen]

    def histograms(self) -> dict[str, tuple[list[int], list[float]]]:
        """Counts [B] and edges [B + 1] of lengths, rewards and advantages; of none where none is finite."""
        values = {
            "completion_tokens": [episode.num_tokens for episode in self.episodes],
            "reward": [episode.rollout.reward for episode in self.episodes],
            "advantage": [episode.advantage for episode in self.episodes if episode.state == "trained"],
        }
        found = {}
        for name, of_episodes in values.items():
            array = np.asarray(of_episodes, dtype=np.float64)
            array = array[np.isfinite(array)]
            if len(array):
                counts, edges = np.histogram(array, bins=NUM_BINS)
                found[f"rollouts/{name}"] = (counts.tolist(), edges.tolist())
        return found


def shortened(text: str, most: int) -> str:
    """``text`` in at most so many characters: its beginning and its end, where the answer is.

    Halves of surrogate pairs, which UTF-8 cannot hold, become question marks.
    """
    text = text.encode(errors="replace").decode()
    if len(text) <= most:
        return text
    tail = most // 2 - 3
    return f"{text[: most - tail - 5]} ... {text[-tail:]}"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
