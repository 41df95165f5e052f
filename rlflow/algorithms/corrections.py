"""Importance weights between the engine that sampled and the trainer that learns, which never agree to the last digit.

The expectation is over the engine's samples, the policy gradient is the trainer's: w = pi_trainer / pi_engine
multiplies each token's loss. pi_trainer has the parameters of before the first update of the step, pi_engine those that
sampled, which are older where staleness is allowed. w carries no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlflow.algorithms.batch import segment_mean, segment_sum
from rlflow.algorithms.kl_reward import LOG_RATIO_BOUND


def _per_token(log_weight: torch.Tensor, sequence_ids: torch.Tensor, num_sequences: int) -> torch.Tensor:
    return log_weight


def _per_sequence(log_weight: torch.Tensor, sequence_ids: torch.Tensor, num_sequences: int) -> torch.Tensor:
    return segment_sum(log_weight, sequence_ids, num_sequences)[sequence_ids]


def _per_sequence_mean(log_weight: torch.Tensor, sequence_ids: torch.Tensor, num_sequences: int) -> torch.Tensor:
    return segment_mean(log_weight, sequence_ids, num_sequences)[sequence_ids]


LEVELS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "token": _per_token,
    "sequence": _per_sequence,
    "sequence_mean": _per_sequence_mean,
}
"""``correction.level`` -> log-weights [N]: of a token, of its sequence's product, of the geometric mean."""


def mismatch_weights(
    trainer_logprobs: torch.Tensor,
    engine_logprobs: torch.Tensor,
    sequence_ids: torch.Tensor,
    num_sequences: int,
    level: str,
) -> torch.Tensor:
    """pi_trainer / pi_engine at every token.

    Args:
        trainer_logprobs: [N], of the parameters before the first update.
        engine_logprobs: [N], as the engine reported them.
        sequence_ids: int64 [N], ascending.
        level: A key of LEVELS.

    Returns:
        [N], without gradient.
    """
    log_weight = LEVELS[level]((trainer_logprobs - engine_logprobs).detach(), sequence_ids, num_sequences)
    return torch.exp(log_weight.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))


def is_out_of_bounds(weights: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """bool [N]: where a weight is below low or above high."""
    return (weights < low) | (weights > high)


def truncate_weights(weights: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """min(max(w, low), high): truncated importance sampling (https://fengyao.notion.site/off-policy-rl), low 0."""
    return weights.clamp(low, high)


def keep_or_drop(weights: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """1 where low <= w <= high, 0 elsewhere: rejection without a weight."""
    return torch.where(is_out_of_bounds(weights, low, high), 0.0, torch.ones_like(weights))


def mask_weights(weights: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """w where low <= w <= high, 0 elsewhere: masked importance sampling (IcePop, arXiv 2510.18855)."""
    return weights.masked_fill(is_out_of_bounds(weights, low, high), 0.0)


CORRECTIONS: dict[str, Callable[[torch.Tensor, float, float], torch.Tensor]] = {
    "truncate": truncate_weights,
    "mask": keep_or_drop,
    "weighted_mask": mask_weights,
}
"""``correction.mode`` -> what a token's loss is multiplied by, of weights [N] and their bounds."""
