"""Scored groups -> samples: rewards to advantages, advantages to tokens, reductions to weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlflow.algorithms.advantages import compute_advantages, soft_overlong_penalty
from rlflow.algorithms.reductions import count_denominators, loss_weights
from rlflow.recipe import AlgorithmBlock
from rlflow.types import Denominators, Group, Sample


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step trains on."""

    groups: list[Group]
    advantages: np.ndarray
    """float64 [P, G]; 0 where unscored."""
    samples: list[Sample]
    """P * G, in prompt order; weights are still missing (see weigh)."""

    @property
    def states(self) -> list[str]:
        """Of every sample: trained, or masked (unscored or truncated)."""
        return ["trained" if sample.loss_mask.any() else "masked" for sample in self.samples]


def assemble(groups: Sequence[Group], algorithm: AlgorithmBlock, max_new_tokens: int) -> Batch:
    """Groups of one step, all of the same size, to samples without loss weights."""
    rewards = np.stack([group.rewards for group in groups]).astype(np.float64)
    block = algorithm.groups
    if block.overlong_buffer_tokens:
        lengths = np.array([[len(r.token_ids) for r in group.rollouts] for group in groups])
        rewards = rewards + block.overlong_penalty * soft_overlong_penalty(
            lengths, max_new_tokens, block.overlong_buffer_tokens
        )
    advantages = compute_advantages(rewards, algorithm.advantage)
    samples = []
    for group, group_advantages in zip(groups, advantages, strict=True):
        prompt = group.prompt.token_ids
        for rollout, advantage in zip(group.rollouts, group_advantages, strict=True):
            trained = not np.isnan(rollout.reward)
            if block.mask_truncated and rollout.finish_reason != "stop":
                trained = False
            before, length = len(prompt), len(rollout.token_ids)
            mask = np.zeros(before + length, dtype=bool)
            mask[before:] = trained
            samples.append(
                Sample(
                    token_ids=np.concatenate([prompt, rollout.token_ids]),
                    loss_mask=mask,
                    loss_weights=np.zeros(before + length, dtype=np.float32),
                    advantages=_after_prompt(before, np.full(length, advantage)),
                    old_logprobs=_after_prompt(before, rollout.logprobs),
                )
            )
    return Batch(list(groups), advantages, samples)


def weigh(
    samples: Sequence[Sample], group_size: int, algorithm: AlgorithmBlock, max_new_tokens: int
) -> tuple[list[Sample], Denominators]:
    """Gives the samples of one optimizer update their loss weights, by the algorithm's reduction."""
    counts = np.array([int(sample.loss_mask.sum()) for sample in samples])
    group_of = np.arange(len(samples)) // group_size
    denominators = count_denominators(counts, group_of)
    weights = loss_weights(algorithm.loss.reduction, counts, group_of, denominators, max_new_tokens)
    weighed = [
        replace(sample, loss_weights=np.where(sample.loss_mask, weight, 0.0).astype(np.float32))
        for sample, weight in zip(samples, weights, strict=True)
    ]
    return weighed, denominators


def rollout_metrics(batch: Batch, policy_version: int) -> dict[str, float]:
    """What the step's rollouts look like. ``policy_version``: of the weights about to be trained."""
    rollouts = [rollout for group in batch.groups for rollout in group.rollouts]
    lengths = np.array([len(rollout.token_ids) for rollout in rollouts])
    rewards = np.array([rollout.reward for rollout in rollouts])
    scored = rewards[~np.isnan(rewards)]
    spread = [np.nanstd(group.rewards) for group in batch.groups if not np.isnan(group.rewards).all()]
    staleness = np.array([policy_version - rollout.policy_version for rollout in rollouts])
    metrics = {
        "reward/mean": float(scored.mean()) if len(scored) else float("nan"),
        "reward/std": float(scored.std()) if len(scored) else float("nan"),
        "reward/unscored_fraction": 1.0 - len(scored) / len(rewards),
        "completion/mean_tokens": float(lengths.mean()),
        "completion/max_tokens": float(lengths.max()),
        "completion/truncated_fraction": float(np.mean([r.finish_reason != "stop" for r in rollouts])),
        "group/zero_std_fraction": float(np.mean(np.array(spread) == 0)) if spread else 1.0,
        "staleness/mean": float(staleness.mean()),
        "staleness/max": float(staleness.max()),
    }
    for name in rollouts[0].rewards:
        values = np.array([rollout.rewards[name] for rollout in rollouts])
        given = values[~np.isnan(values)]
        metrics[f"reward/{name}/mean"] = float(given.mean()) if len(given) else float("nan")
    return metrics


def _after_prompt(num_prompt_tokens: int, values: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(num_prompt_tokens), values]).astype(np.float32)
