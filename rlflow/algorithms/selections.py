"""Which tokens of an optimizer update a policy loss treats apart, chosen over the whole update. numpy, on the driver.

The covariance of a token is (log pi - mean of log pi) (A - mean of A), the means over the update's loss tokens
(arXiv 2505.22617, section 4.2). log pi is the policy's of before the step's first update, because that is what is known
of every token: the choice travels with the samples, so that no micro-batch, packing or rank has its own. In a step's
first update it is the current policy's, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rlflow.algorithms.kl_reward import policy_logprobs
from rlflow.data.sampler import permutation
from rlflow.recipe.policy_loss_blocks import ClipCovBlock, KLCovBlock, PolicyLossBlock
from rlflow.types import Sample


def with_selection(samples: Sequence[Sample], loss: PolicyLossBlock, seed: int, stream: str) -> list[Sample]:
    """The samples of one optimizer update, with the tokens that their loss treats apart where it has such.

    Args:
        seed: Of what is drawn.
        stream: What it is drawn for: the same seed draws the same for the same stream.
    """
    if loss.kind not in SELECTIONS:
        return list(samples)
    covariances = covariances_of(samples)
    chosen = SELECTIONS[loss.kind](covariances, loss, lambda count: permutation(count, seed, stream))
    ends = np.cumsum([int(sample.loss_mask.sum()) for sample in samples])[:-1]
    return [
        replace(sample, selected=_on_loss_tokens(sample, of_sample))
        for sample, of_sample in zip(samples, np.split(chosen, ends), strict=True)
    ]


def covariances_of(samples: Sequence[Sample]) -> np.ndarray:
    """float64 [M] of the M loss tokens of an update, in their order."""
    logprobs, advantages = [], []
    for sample in samples:
        of_policy = policy_logprobs(sample)
        assert of_policy is not None, "the covariance needs the policy's logprobs of before the update"
        assert sample.advantages is not None
        logprobs.append(of_policy[sample.loss_mask].astype(np.float64))
        advantages.append(sample.advantages[sample.loss_mask].astype(np.float64))
    if not sum(map(len, logprobs)):
        return np.zeros(0)
    of_tokens, gains = np.concatenate(logprobs), np.concatenate(advantages)
    return (of_tokens - of_tokens.mean()) * (gains - gains.mean())


def clip_cov(covariances: np.ndarray, block: ClipCovBlock, shuffled: Callable[[int], np.ndarray]) -> np.ndarray:
    """bool [M]: a share of all tokens, drawn among those whose covariance lies between the bounds."""
    between = np.flatnonzero((covariances > block.covariance_low) & (covariances < block.covariance_high))
    count = min(len(between), max(1, int(block.share * len(covariances))))
    chosen = np.zeros(len(covariances), dtype=bool)
    chosen[between[shuffled(len(between))[:count]]] = True
    return chosen


def kl_cov(covariances: np.ndarray, block: KLCovBlock, shuffled: Callable[[int], np.ndarray]) -> np.ndarray:
    """bool [M]: the share of all tokens whose covariances are the largest; the earlier of two that are equal."""
    count = min(len(covariances), max(1, int(block.share * len(covariances))))
    chosen = np.zeros(len(covariances), dtype=bool)
    chosen[np.argsort(-covariances, kind="stable")[:count]] = True
    return chosen


SELECTIONS: dict[str, Callable[[np.ndarray, Any, Callable[[int], np.ndarray]], np.ndarray]] = {
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
}
"""``loss.kind`` -> function of the covariances [M], the kind's block and what shuffles so many; other kinds treat all
tokens alike."""


def _on_loss_tokens(sample: Sample, values: np.ndarray) -> np.ndarray:
    """float32 [T] of values [L] of the loss tokens; 0 elsewhere."""
    placed = np.zeros(len(sample.token_ids), dtype=np.float32)
    placed[sample.loss_mask] = values
    return placed
