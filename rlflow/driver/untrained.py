"""Why a run may have trained nothing, as far as its last step says."""

from __future__ import annotations

from collections.abc import Mapping

from rlflow.recipe import Recipe

_MANY = 0.5
"""A share of completions that is worth a word."""


def why_nothing_was_trained(recipe: Recipe, metrics: Mapping[str, float]) -> str:
    """What may have been the matter, and what to look at.

    Args:
        metrics: Of the last step; none where no step ended in this process.
    """
    if metrics.get("trainer/skipped") == 1.0:
        return (
            "In the last step the loss or its gradient was not finite: look at the weights that training starts from "
            "and at model.dtype"
        )
    if recipe.rewards:
        reason = (
            "No group had two different rewards: look at rollouts/ and at the reward functions, or start from a model "
            "that is right at times"
        )
    elif recipe.needs_teacher:
        reason = (
            "The teacher says what the policy says already: look at teacher.path, and at algorithm.distill.temperature "
            "where it is far from 1"
        )
    else:
        reason = "No token was trained: look at data.loss_on"
    share, limit = metrics.get("completion/truncated_fraction", 0.0), recipe.rollout.max_new_tokens
    if share < _MANY:
        return reason
    return (
        f"{reason}. {share:.0%} of the last step's completions were cut at their {limit} tokens: raise "
        "rollout.max_new_tokens, so that they come to an end"
    )
