"""Rollouts of one turn, as tests need them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rlflow.types import Rollout, RolloutEnd


def flat(
    prompt: Sequence[int] | np.ndarray,
    completion: Sequence[int] | np.ndarray,
    reward: float = 0.0,
    *,
    logprobs: Sequence[float] | np.ndarray | None = None,
    version: int = 0,
    finish_reason: RolloutEnd = "stop",
    text: str = "",
    rewards: Mapping[str, float] | None = None,
    error: str = "",
) -> Rollout:
    """A prompt and what the policy wrote behind it; its logprobs are -1, -2, ... unless they are given."""
    of_completion = -np.arange(1.0, len(completion) + 1) if logprobs is None else logprobs
    is_sampled = np.arange(len(prompt) + len(completion)) >= len(prompt)
    return Rollout(
        token_ids=np.concatenate([prompt, completion]).astype(np.int32),
        is_sampled=is_sampled,
        logprobs=np.concatenate([np.zeros(len(prompt)), of_completion]).astype(np.float32),
        versions=np.where(is_sampled, version, -1).astype(np.int32),
        finish_reason=finish_reason,
        text=text,
        rewards={"r": reward} if rewards is None else rewards,
        reward=reward,
        error=error,
    )
