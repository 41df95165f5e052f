"""Reward functions by name, and how a recipe's reward becomes something to call.

A reward function is ``fn(prompts, completions, completion_ids, **columns) -> list[float | None]``, TRL's signature:
prompts are message lists, completions strings, completion_ids token ids, columns the other columns of the data as
lists; None abstains. It may be a coroutine function. Nothing here imports a reward function before it is asked for.
"""

from __future__ import annotations

from rlflow.rewards.resolving import REWARDS, RewardError, RewardFunction, load, resolve

__all__ = ["REWARDS", "RewardError", "RewardFunction", "load", "resolve"]
