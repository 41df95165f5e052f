"""Rewards to advantages, and what shapes rewards before that. numpy, on the driver, over a whole batch.

Unscored rollouts have the reward NaN. They are left out of every mean and standard deviation and get advantage 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlflow.algorithms.own_advantages import own_advantages
from rlflow.plugins import PluginError
from rlflow.recipe.advantage_blocks import Advantage, BaselineBlock, GAEBlock, OwnAdvantageBlock


def compute_advantages(rewards: np.ndarray, block: BaselineBlock, weights: np.ndarray | None = None) -> np.ndarray:
    """One advantage a rollout: (reward - baseline) / (standard deviation, or what else ``scale`` says, + eps).

    Args:
        rewards: float [P, G], NaN where unscored; of groups that have fewer than G rollouts, also where there is none.
        weights: float [P, G], of the rewards in a baseline that is a weighted mean; equal when absent.

    Returns:
        float64 [P, G], 0 where unscored, and where there is no baseline.

    Raises:
        PluginError: ``scale: group_mean`` and a reward below 0.
    """
    rewards = rewards.astype(np.float64)
    difference = rewards - BASELINES[block.estimator](rewards, np.ones_like(rewards) if weights is None else weights)
    if block.scale != "none":
        difference = difference / (SCALES[block.scale](rewards, block.ddof) + block.eps)
    return np.where(np.isnan(difference), 0.0, difference)


def token_advantages(
    rewards: np.ndarray,
    group_of: np.ndarray,
    penalties: Sequence[np.ndarray],
    block: Advantage,
    values: Sequence[np.ndarray] | None = None,
    *,
    lengths: np.ndarray | None = None,
    is_baseline: np.ndarray | None = None,
    columns: Sequence[Mapping[str, Any]] = (),
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """One advantage a loss token, for every estimator, with the KL in the reward when ``penalties`` say so.

    Group and batch estimators subtract a rollout's summed penalties from its reward and give all its tokens the same
    advantage. ``return`` and ``gae`` subtract each token's penalty where it falls; the reward comes at the last loss
    token. What is between two loss tokens (a tool's output) is no step of the episode: one follows the other.

    Args:
        rewards: float [S], NaN where unscored.
        group_of: int [S], ascending: the same number for the rollouts of one prompt, of which there may be any number.
        penalties: [L] a rollout, L its loss tokens: ``kl.coef`` times kl_penalty; zeros where the KL is not in the
            reward.
            Empty for a rollout that is scored and not trained: its reward counts in its group's baseline.
        values: [L] a rollout: the critic's value before each loss token. Needed by gae.
        lengths: int [S], tokens that the policy wrote, trained or not; L when absent.
        is_baseline: bool [S]: the greedy rollouts, of which each group has one; none when absent. Needed by greedy.
        columns: [S], of each rollout's prompt, for a function of the user's own.

    Returns:
        Advantages and returns (what values should have been), float64 [L] a rollout each; 0 where unscored.
    """
    scored = ~np.isnan(rewards)
    if isinstance(block, OwnAdvantageBlock):
        totals, sizes = rewards - np.array([float(np.sum(p)) for p in penalties]), np.array(list(map(len, penalties)))
        advantages = own_advantages(block, totals, group_of, sizes, columns)
        returns = [np.full(n, t) for n, t in zip(sizes, np.nan_to_num(totals), strict=True)]
    elif not isinstance(block, BaselineBlock):
        is_gae = isinstance(block, GAEBlock)
        if is_gae and values is None:
            raise ValueError("advantage.estimator gae needs a value for each token; none were given")
        baseline, lam = (values, block.gae_lambda) if is_gae and values else (None, 1.0)
        advantages, returns = _with_values(rewards, penalties, baseline, block.gamma, lam)
    else:
        totals = rewards - np.array([float(np.sum(p)) for p in penalties])
        places = _places(group_of)
        grid = np.full((places[0][-1] + 1, places[1].max() + 1), np.nan)
        grid[places] = totals
        weights = np.zeros_like(grid)
        weights[places] = _baseline_weights(block, penalties, lengths, is_baseline)
        per_rollout = compute_advantages(grid, block, weights)[places]
        advantages = [np.full(len(p), a) for p, a in zip(penalties, per_rollout, strict=True)]
        returns = [np.full(len(p), t) for p, t in zip(penalties, np.nan_to_num(totals), strict=True)]
    if block.whiten:
        chosen = np.flatnonzero(scored)
        for row, whitened in zip(chosen, whiten([advantages[row] for row in chosen], block.ddof), strict=True):
            advantages[row] = whitened
    if block.clip is not None:
        advantages = [advantage.clip(-block.clip, block.clip) for advantage in advantages]
    return advantages, returns


def _baseline_weights(
    block: BaselineBlock,
    penalties: Sequence[np.ndarray],
    lengths: np.ndarray | None,
    is_baseline: np.ndarray | None,
) -> np.ndarray:
    """float [S], of rollouts in a baseline that is a weighted mean: their lengths, or 1 for the greedy one alone."""
    if block.num_greedy:
        assert is_baseline is not None, "a greedy baseline needs greedy rollouts"
        return is_baseline.astype(np.float64)
    return np.array(list(map(len, penalties)), dtype=np.float64) if lengths is None else lengths.astype(np.float64)


def gae(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16), the episode ending after the last token:

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lambda A_{t+1},    R_t = A_t + V_t

    Args:
        rewards: float [..., C]. Shorter sequences are padded with zeros on the right, in both arguments.
        values: float [..., C]: V_t, the critic's before token t.

    Returns:
        Advantages and returns, float64 [..., C].
    """
    rewards, values = rewards.astype(np.float64), values.astype(np.float64)
    following = np.concatenate([values[..., 1:], np.zeros_like(values[..., :1])], axis=-1)
    deltas = rewards + gamma * following - values
    advantages = np.zeros_like(deltas)
    running = np.zeros(deltas.shape[:-1])
    for t in reversed(range(deltas.shape[-1])):
        running = deltas[..., t] + gamma * lam * running
        advantages[..., t] = running
    return advantages, advantages + values


def whiten(arrays: Sequence[np.ndarray], ddof: int = 1, eps: float = 1e-8) -> list[np.ndarray]:
    """Shifts and scales all elements together to mean 0 and variance 1: (x - mean) / sqrt(variance + eps).

    A single element, or none, becomes 0.
    """
    flat = np.concatenate([np.asarray(array, dtype=np.float64).ravel() for array in arrays] or [np.zeros(0)])
    if len(flat) <= max(1, ddof):
        return [np.zeros(np.shape(array)) for array in arrays]
    mean, scale = flat.mean(), np.sqrt(flat.var(ddof=ddof) + eps)
    return [(array - mean) / scale for array in arrays]


def soft_overlong_penalty(lengths: np.ndarray, max_new_tokens: int, buffer_tokens: float) -> np.ndarray:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), from 0 down to -1 over the buffer's tokens:

        0 up to L_max - L_buffer,    (L_max - L_buffer - length) / L_buffer in between,    -1 from L_max on

    Args:
        lengths: int [...], tokens of each completion.
    """
    return np.clip((max_new_tokens - buffer_tokens - lengths) / buffer_tokens, -1.0, 0.0)


def combine_rewards(
    rewards: np.ndarray,
    failed: np.ndarray,
    weights: np.ndarray,
    scaling: str = "sum",
    ddof: int = 1,
    eps: float = 1e-4,
) -> np.ndarray:
    """Several reward functions to one reward a rollout.

    A function that abstains (NaN) is left out of the sum. A rollout is unscored when every function abstained or any
    function failed: a failure must not pass for a low score.

    Args:
        rewards: float [K, P, G] by function; NaN where it abstained or failed, and where a group has fewer than G.
        failed: bool [K, P, G].
        weights: float [K].
        scaling: ``sum``: weighted sum. ``normalize_each``: every function is first normalised in its group
            (GDPO, arXiv 2601.05242; batch_mean with batch_std then gives its last step). ``normalize_sum``: the sum is
            normalised over the batch.

    Returns:
        float64 [P, G], NaN where unscored.
    """
    rewards = rewards.astype(np.float64)
    if scaling == "normalize_each":
        rewards = np.stack([(r - _mean(r, axis=1)) / (_group_std(r, ddof) + eps) for r in rewards])
    given = ~np.isnan(rewards)
    total = np.where(given, rewards * np.reshape(weights, (-1, 1, 1)), 0.0).sum(axis=0)
    total = np.where(failed.any(axis=0) | ~given.any(axis=0), np.nan, total)
    if scaling == "normalize_sum":
        total = (total - _mean(total, axis=None)) / (_batch_std(total, ddof) + eps)
    return total


def has_signal(rewards: np.ndarray) -> bool:
    """Whether the scored rewards [G] of a group differ, so that a group baseline leaves a gradient."""
    scored = rewards[~np.isnan(rewards)]
    return len(scored) > 1 and bool(np.ptp(scored) > 0)


def _places(group_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every rollout: which group it is of, counted from 0, and which of that group's it is."""
    assert (np.diff(group_of) >= 0).all(), "rollouts of a group stand next to each other"
    _, first, group = np.unique(group_of, return_index=True, return_inverse=True)
    return group, np.arange(len(group_of)) - first[group]


def _mean(rewards: np.ndarray, axis: int | None) -> np.ndarray:
    """Mean of the scored rewards, 0 where there are none; keeps the axes."""
    scored = ~np.isnan(rewards)
    count = scored.sum(axis=axis, keepdims=True)
    return np.where(scored, rewards, 0.0).sum(axis=axis, keepdims=True) / np.maximum(count, 1)


def _std(rewards: np.ndarray, axis: int | None, ddof: int) -> np.ndarray:
    """Standard deviation of the scored rewards, 0 where there are too few; keeps the axes."""
    scored = ~np.isnan(rewards)
    count = scored.sum(axis=axis, keepdims=True)
    squares = np.where(scored, (rewards - _mean(rewards, axis)) ** 2, 0.0).sum(axis=axis, keepdims=True)
    return np.sqrt(squares / np.maximum(count - ddof, 1)) * (count > ddof)


def _group_mean(rewards: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """GRPO (arXiv 2402.03300, section 4.1.2), Dr. GRPO (arXiv 2503.20783)."""
    return _mean(rewards, axis=1)


def _weighted_mean(rewards: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sum of w r / sum of w over the group's scored rewards; NaN where their weights are all 0.

    With lengths as weights it is OPO's optimal baseline (arXiv 2505.23585), with 1 for the greedy rollout and 0 for the
    others ReMax's (arXiv 2310.10505).
    """
    weights = np.where(np.isnan(rewards), 0.0, weights)
    total = weights.sum(axis=1, keepdims=True)
    return np.where(total > 0, (weights * np.nan_to_num(rewards)).sum(axis=1, keepdims=True), np.nan) / np.where(
        total > 0, total, 1.0
    )


def _leave_one_out(rewards: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of the group's other scored rewards (RLOO, arXiv 2402.14740); a lone one is its own baseline."""
    others = np.maximum((~np.isnan(rewards)).sum(axis=1, keepdims=True) - 1, 0)
    total = np.nansum(rewards, axis=1, keepdims=True)
    return np.where(others > 0, (total - rewards) / np.maximum(others, 1), rewards)


def _batch_mean(rewards: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """REINFORCE with the batch's mean as baseline."""
    return _mean(rewards, axis=None)


def _group_std(rewards: np.ndarray, ddof: int) -> np.ndarray:
    return _std(rewards, 1, ddof)


def _batch_std(rewards: np.ndarray, ddof: int) -> np.ndarray:
    return _std(rewards, None, ddof)


def _positive_group_mean(rewards: np.ndarray, ddof: int) -> np.ndarray:
    """MaxRL (arXiv 2602.02710): the share of a group's rollouts that succeed, where rewards are 0 and 1."""
    if (rewards < 0).any():
        raise PluginError(
            f"advantage.scale group_mean divides by the mean reward of a group, and one of its rewards is "
            f"{np.nanmin(rewards):g}: give rewards of at least 0, or take another advantage.scale"
        )
    return _mean(rewards, axis=1)


BASELINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "group_mean": _group_mean,
    "leave_one_out": _leave_one_out,
    "batch_mean": _batch_mean,
    "length_weighted_mean": _weighted_mean,
    "greedy": _weighted_mean,
}
"""``advantage.estimator`` -> what is subtracted: rewards and weights [P, G] to something that broadcasts to it."""

SCALES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "group_std": _group_std,
    "batch_std": _batch_std,
    "group_mean": _positive_group_mean,
}
"""``advantage.scale`` -> what the difference is divided by."""


def _with_values(
    rewards: np.ndarray,
    penalties: Sequence[np.ndarray],
    values: Sequence[np.ndarray] | None,
    gamma: float,
    lam: float,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """gae over rows of unequal length; without values and with lambda 1 it is the discounted sum of what follows."""
    lengths = [len(p) for p in penalties]
    token_rewards, padded_values = np.zeros((2, len(lengths), max(lengths, default=0)))
    for row, (length, reward) in enumerate(zip(lengths, rewards, strict=True)):
        if length and not np.isnan(reward):
            token_rewards[row, :length] = -penalties[row]
            token_rewards[row, length - 1] += reward
            if values is not None:
                padded_values[row, :length] = values[row]
    advantages, returns = gae(token_rewards, padded_values, gamma, lam)
    return (
        [advantages[row, :length] for row, length in enumerate(lengths)],
        [returns[row, :length] for row, length in enumerate(lengths)],
    )
