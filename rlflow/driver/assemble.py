"""Scored groups -> samples: rewards to advantages, advantages to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import numpy as np

from rlflow.algorithms.advantages import combine_rewards, has_signal, soft_overlong_penalty, token_advantages
from rlflow.algorithms.kl_reward import LOG_RATIO_BOUND, kl_penalty, policy_logprobs
from rlflow.recipe import OnlineBlock, RewardBlock
from rlflow.recipe.distill_blocks import AdvantageDistillBlock, Distill
from rlflow.rewards.score_batch import ScoreBatch
from rlflow.tracking.episodes import Episode, Episodes
from rlflow.types import Group, GroupRequest, Prompt, Rollout, RolloutBatch, RolloutEnd, Sample

T = TypeVar("T")
ENDINGS: tuple[RolloutEnd, ...] = ("stop", "length", "turns", "time")
"""By which episodes end whose environments do not fail."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step trains on: R rollouts in prompt order, those of a group next to each other; S samples, one for each
    sequence of a rollout, as a rule one."""

    groups: list[Group]
    rewards: np.ndarray
    """float64 [R], length punishment included; NaN where unscored."""
    samples: list[Sample]
    """[S]; each says which of ``groups``, and which rollout, it is of."""

    @property
    def rollouts(self) -> list[Rollout]:
        """[R]."""
        return [rollout for group in self.groups for rollout in group.rollouts]

    @property
    def group_of(self) -> np.ndarray:
        """int64 [R]."""
        return np.repeat(np.arange(len(self.groups)), [len(group.rollouts) for group in self.groups])

    @property
    def first_samples(self) -> np.ndarray:
        """int64 [R + 1]: rollout r has the samples ``[first_samples[r]:first_samples[r + 1]]``."""
        return np.cumsum([0, *(len(_trained_sequences(rollout)) for rollout in self.rollouts)])

    @property
    def lengths(self) -> np.ndarray:
        """int64 [R]: tokens that the policy wrote."""
        return np.array([int(rollout.is_sampled.sum()) for rollout in self.rollouts])

    @property
    def num_sampled_tokens(self) -> np.ndarray:
        """int [S]: the loss tokens of every sample; of one that is left out whole, all that the policy wrote."""
        written = [
            int(rollout.is_sampled[part].sum()) for rollout in self.rollouts for part in _trained_sequences(rollout)
        ]
        trained = [int(sample.loss_mask.sum()) for sample in self.samples]
        return np.where(trained, trained, written)

    @property
    def states(self) -> list[str]:
        """Of every rollout: trained, masked (unscored or truncated), or the baseline of its group."""
        trained = [any(sample.loss_mask.any() for sample in own) for own in self.by_rollout(self.samples)]
        return [
            "baseline" if rollout.is_baseline else "trained" if is_trained else "masked"
            for rollout, is_trained in zip(self.rollouts, trained, strict=True)
        ]

    def by_rollout(self, of_samples: Sequence[T]) -> list[Sequence[T]]:
        """What belongs to the samples [S], in R parts."""
        return [of_samples[start:end] for start, end in pairwise(self.first_samples.tolist())]


def unscored_group(request: GroupRequest, batch: RolloutBatch, index: int) -> Group:
    """The group ``index`` of a batch, which came of this request."""
    first = sum(batch.sizes[:index])
    offsets = batch.offsets[first : first + batch.sizes[index] + 1].tolist()
    rollouts = []
    for g, (start, end) in enumerate(pairwise(offsets)):
        row, tokens = first + g, slice(start, end)
        rollouts.append(
            Rollout(
                token_ids=batch.token_ids[tokens],
                is_sampled=batch.is_sampled[tokens],
                logprobs=batch.logprobs[tokens],
                versions=batch.versions[tokens],
                finish_reason=batch.finish_reasons[row],
                text=batch.texts[row],
                episode=batch.episodes[row] if batch.episodes else None,
                is_baseline=request.is_greedy(g),
            )
        )
    return Group(request.prompt, request.epoch, tuple(rollouts))


def scored_group(group: Group, scores: ScoreBatch, rewards: Sequence[RewardBlock], algorithm: OnlineBlock) -> Group:
    """The group with its rewards, combined by their weights; 0 where there are none."""
    by_function, combined = _combined(scores, rewards, algorithm) if rewards else ([], _unrewarded(group))
    rollouts = [
        replace(
            rollout,
            rewards={block.label: float(by_function[k][g]) for k, block in enumerate(rewards)},
            reward=float(combined[g]),
            error=scores.causes.get(g, ""),
        )
        for g, rollout in enumerate(group.rollouts)
    ]
    return replace(group, rollouts=tuple(rollouts))


def _combined(
    scores: ScoreBatch, rewards: Sequence[RewardBlock], algorithm: OnlineBlock
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards by function, and together: float [K, G] and [G]."""
    by_function = np.stack([scores.rewards[block.label] for block in rewards])
    failed = np.stack([scores.failed[block.label] for block in rewards])
    weights = np.array([block.weight for block in rewards])
    scaling = algorithm.groups.reward_scaling
    # What is normalised over the batch waits until all of it is there.
    now = "sum" if scaling == "normalize_sum" else scaling
    advantage = algorithm.advantage
    combined = combine_rewards(by_function[:, None], failed[:, None], weights, now, advantage.ddof, advantage.eps)[0]
    return by_function, combined


def _unrewarded(group: Group) -> np.ndarray:
    """float [G]: 0, and NaN where an environment failed, whose rollouts are not trained."""
    failed = [rollout.episode is not None and bool(rollout.episode.error) for rollout in group.rollouts]
    return np.where(failed, np.nan, 0.0)


def assemble(
    groups: Sequence[Group], algorithm: OnlineBlock, max_new_tokens: int, *, engine_logprobs: bool = True
) -> Batch:
    """Groups of one step, of any sizes, to samples without advantages and loss weights.

    Args:
        engine_logprobs: Whether the samples carry them; not where sampling was cut, and they are of another
            distribution than the trainer's.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = np.concatenate([group.rewards for group in groups]).astype(np.float64)
    block = algorithm.groups
    if block.reward_scaling == "normalize_sum":
        advantage, none_failed = algorithm.advantage, np.zeros((1, 1, len(rewards)), dtype=bool)
        rewards = combine_rewards(
            rewards[None, None], none_failed, np.ones(1), "normalize_sum", advantage.ddof, advantage.eps
        )[0]
    if block.overlong_buffer:
        lengths = np.array([int(rollout.is_sampled.sum()) for rollout in rollouts])
        punishment = soft_overlong_penalty(lengths, max_new_tokens, block.overlong_buffer * max_new_tokens)
        rewards = rewards + block.overlong_penalty * punishment
    group_of = [index for index, group in enumerate(groups) for _ in group.rollouts]
    samples = []
    for row, (index, rollout) in enumerate(zip(group_of, rollouts, strict=True)):
        truncated = block.mask_truncated and rollout.finish_reason != "stop"
        is_left_out = truncated or np.isnan(rollout.reward)
        for part in _trained_sequences(rollout):
            is_sampled = rollout.is_sampled[part]
            samples.append(
                Sample(
                    token_ids=rollout.token_ids[part],
                    loss_mask=np.zeros_like(is_sampled) if is_left_out else is_sampled,
                    loss_weights=np.zeros(len(is_sampled), dtype=np.float32),
                    group=index,
                    rollout=row,
                    old_logprobs=rollout.logprobs[part] if engine_logprobs else None,
                    images=_images(groups[index].prompt, rollout),
                )
            )
    return Batch(list(groups), rewards, samples)


def _images(prompt: Prompt, rollout: Rollout) -> tuple[bytes, ...]:
    """A rollout's pictures: an environment that began with messages of its own has shown them where those say so."""
    began = None if rollout.episode is None else rollout.episode.prompt
    is_shown = began is None or any(message.get("images") for message in began)
    return prompt.images if is_shown else ()


def with_advantages(batch: Batch, samples: Sequence[Sample], algorithm: OnlineBlock) -> list[Sample]:
    """Gives every loss token its advantage; with the KL in the reward, from the samples' reference logprobs.

    Samples that have a critic's values get what these should have been, too. Other tokens have neither: what a mask
    leaves out, at an end or in the middle, takes no part in any recursion, mean or standard deviation.
    """
    penalties = [_joined(own) for own in batch.by_rollout([_penalty(sample, algorithm) for sample in samples])]
    of_samples = [s.old_values[s.loss_mask] for s in samples if s.old_values is not None]
    values = [_joined(own) for own in batch.by_rollout(of_samples)] if of_samples else None
    of_rollouts = token_advantages(
        batch.rewards,
        batch.group_of,
        penalties,
        algorithm.advantage,
        values,
        lengths=batch.lengths,
        is_baseline=np.array([rollout.is_baseline for rollout in batch.rollouts]),
        columns=[group.prompt.columns for group in batch.groups for _ in group.rollouts],
    )
    # The loss tokens of a rollout's sequences follow one another.
    ends = np.cumsum([int(sample.loss_mask.sum()) for sample in samples])[:-1]
    advantages, returns = (np.split(np.concatenate(each), ends) for each in of_rollouts)
    return [
        replace(
            sample,
            advantages=_on_loss_tokens(sample, advantage),
            returns=None if values is None else _on_loss_tokens(sample, of_sample),
        )
        for sample, advantage, of_sample in zip(samples, advantages, returns, strict=True)
    ]


def _penalty(sample: Sample, algorithm: OnlineBlock) -> np.ndarray:
    """float64 [L]: what the KL takes off the reward of each loss token."""
    kl, mask = algorithm.kl, sample.loss_mask
    if kl.placement != "reward" or sample.ref_logprobs is None:
        return np.zeros(int(mask.sum()))
    logprobs = policy_logprobs(sample)
    assert logprobs is not None, "a KL in the reward needs the policy's logprobs"
    return kl.coef * kl_penalty(kl.estimator, logprobs[mask], sample.ref_logprobs[mask])


def rollout_advantages(batch: Batch, samples: Sequence[Sample], algorithm: OnlineBlock) -> list[np.ndarray]:
    """float64 [G] for each group, of any size: the mean advantage of each rollout's tokens, for people to read.

    A teacher's part is that of the policy's logprobs of before the update, as far as the driver has them.
    """
    of_samples = [_advantages(sample, algorithm.distill)[sample.loss_mask] for sample in samples]
    of_rollouts = [_joined(own) for own in batch.by_rollout(of_samples)]
    means = np.array([float(advantages.mean()) if len(advantages) else 0.0 for advantages in of_rollouts])
    return np.split(means, np.cumsum([len(group.rollouts) for group in batch.groups])[:-1])


def _advantages(sample: Sample, distill: Distill) -> np.ndarray:
    """float [T]."""
    advantages = np.zeros(len(sample.token_ids)) if sample.advantages is None else sample.advantages
    logprobs = policy_logprobs(sample)
    if not isinstance(distill, AdvantageDistillBlock) or sample.teacher_logprobs is None or logprobs is None:
        return advantages
    log_ratio = (logprobs - sample.teacher_logprobs).clip(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return advantages - distill.coef * log_ratio


def episodes(batch: Batch, advantages: Sequence[np.ndarray], step: int) -> Episodes:
    """The rollouts of ``step``, counted from 1, for people to look at. ``advantages``: of `rollout_advantages`."""
    states = iter(batch.states)
    return Episodes(
        step,
        [
            Episode(group.prompt, rollout, float(advantage), next(states))
            for group, of_group in zip(batch.groups, advantages, strict=True)
            for rollout, advantage in zip(group.rollouts, of_group, strict=True)
        ],
    )


def rollout_metrics(batch: Batch, policy_version: int) -> dict[str, float]:
    """What the step's rollouts look like. ``policy_version``: of the weights about to be trained."""
    rollouts = [rollout for rollout in batch.rollouts if not rollout.is_baseline]
    baselines = [rollout.reward for rollout in batch.rollouts if rollout.is_baseline]
    lengths = np.array([int(rollout.is_sampled.sum()) for rollout in rollouts])
    rewards = np.array([rollout.reward for rollout in rollouts])
    scored = rewards[~np.isnan(rewards)]
    versions = [rollout.versions[rollout.is_sampled] for rollout in rollouts]
    staleness = policy_version - np.concatenate(versions)
    num_versions = np.array([len(np.unique(of_rollout)) for of_rollout in versions])
    of_rewards = {
        "reward/mean": float(scored.mean()) if len(scored) else float("nan"),
        "reward/std": float(scored.std()) if len(scored) else float("nan"),
        "reward/unscored_fraction": 1.0 - len(scored) / len(rewards),
        "group/zero_std_fraction": float(np.mean([not has_signal(group.rewards) for group in batch.groups])),
    }
    metrics = {
        **(of_rewards if rollouts[0].rewards else {}),
        "completion/mean_tokens": float(lengths.mean()),
        "completion/max_tokens": float(lengths.max()),
        "completion/truncated_fraction": float(np.mean([r.finish_reason != "stop" for r in rollouts])),
        "staleness/mean": float(staleness.mean()),
        "staleness/max": float(staleness.max()),
        "partial/fraction": float((num_versions > 1).mean()),
        "partial/max_versions": float(num_versions.max()),
    }
    if baselines and not np.isnan(baselines).all():
        metrics["reward/greedy_mean"] = float(np.nanmean(baselines))
    for name in rollouts[0].rewards:
        values = np.array([rollout.rewards[name] for rollout in rollouts])
        given = values[~np.isnan(values)]
        metrics[f"reward/{name}/mean"] = float(given.mean()) if len(given) else float("nan")
    return metrics | episode_metrics(rollouts)


def episode_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What happened in the environments of the rollouts that were in one; empty where none was."""
    episodes = [rollout.episode for rollout in rollouts if rollout.episode is not None]
    if not episodes:
        return {}
    turns = np.array([episode.num_turns for episode in episodes])
    given = np.array([episode.reward for episode in episodes])
    given = given[~np.isnan(given)]
    counts: dict[str, float] = {}
    for episode in episodes:
        for name, count in episode.counts.items():
            counts[name] = counts.get(name, 0) + count
    reasons = [rollout.finish_reason for rollout in rollouts]
    return {
        "environment/turns": float(turns.mean()),
        "environment/max_turns": float(turns.max()),
        "environment/reward": float(given.mean()) if len(given) else float("nan"),
        "environment/failed_fraction": float(np.mean([bool(episode.error) for episode in episodes])),
        "environment/seconds": float(np.mean([episode.environment_s for episode in episodes])),
        "environment/sequences": float(np.mean([len(episode.starts) for episode in episodes])),
        **{f"environment/ended_by_{reason}": reasons.count(reason) / len(reasons) for reason in ENDINGS},
        **{f"environment/{name}": count / len(episodes) for name, count in sorted(counts.items())},
    }


def _trained_sequences(rollout: Rollout) -> list[slice]:
    """Where the sequences are among a rollout's tokens that become samples; a baseline has none."""
    return [] if rollout.is_baseline else rollout.sequences


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """End to end; empty for none."""
    return np.concatenate(arrays) if len(arrays) else np.zeros(0)


def _on_loss_tokens(sample: Sample, values: np.ndarray) -> np.ndarray:
    """float32 [T] of values [L] of the loss tokens; 0 elsewhere."""
    placed = np.zeros(len(sample.token_ids), dtype=np.float32)
    placed[sample.loss_mask] = values
    return placed
