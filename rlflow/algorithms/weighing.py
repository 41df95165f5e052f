"""The loss weights of one optimizer batch's samples, by the algorithm's reduction. numpy, on the driver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from rlflow.algorithms.reductions import count_denominators, loss_weights, preference_weights
from rlflow.recipe import AlgorithmBlock
from rlflow.types import Denominators, Sample


def weigh(
    samples: Sequence[Sample], algorithm: AlgorithmBlock, max_tokens: int, counts: np.ndarray | None = None
) -> tuple[list[Sample], Denominators]:
    """Gives the samples of one optimizer update their loss weights.

    Args:
        max_tokens: What ``fixed_length`` divides by.
        counts: int [S], tokens of each sample that its weight is divided by; its loss tokens when absent.

    Returns:
        The samples, and the counts of what is trained, which the metrics are means over.
    """
    trained = np.array([int(sample.loss_mask.sum()) for sample in samples])
    counted = trained if counts is None else counts
    weights, denominators = WEIGHTS[algorithm.learning.weights](samples, algorithm, max_tokens, trained, counted)
    weighed = [
        replace(sample, loss_weights=np.where(sample.loss_mask, weight, 0.0).astype(np.float32))
        for sample, weight in zip(samples, weights, strict=True)
    ]
    return weighed, denominators


def rollouts_of(samples: Sequence[Sample]) -> np.ndarray:
    """int64 [S], ascending: the same number for the sequences of one rollout."""
    is_first = [
        index == 0 or sample.rollout is None or sample.rollout != samples[index - 1].rollout
        for index, sample in enumerate(samples)
    ]
    return np.cumsum(is_first) - 1


def _of_all(
    samples: Sequence[Sample], algorithm: AlgorithmBlock, max_tokens: int, trained: np.ndarray, counted: np.ndarray
) -> tuple[np.ndarray, Denominators]:
    # A rollout of several sequences is one: they share its weight.
    first, row_of = np.unique(rollouts_of(samples), return_index=True, return_inverse=True)[1:]
    groups = np.array([samples[index].group for index in first])
    counted, trained = (np.bincount(row_of, weights=each).astype(np.int64) for each in (counted, trained))
    weights = loss_weights(algorithm.reduction, counted, groups, count_denominators(counted, groups), max_tokens)
    return weights[row_of], count_denominators(trained, groups)


def _of_chosen(
    samples: Sequence[Sample], algorithm: AlgorithmBlock, max_tokens: int, trained: np.ndarray, counted: np.ndarray
) -> tuple[np.ndarray, Denominators]:
    labels = np.array([sample.label for sample in samples])
    return preference_weights(algorithm.reduction, counted, labels, max_tokens)


WEIGHTS: dict[
    str, Callable[[Sequence[Sample], AlgorithmBlock, int, np.ndarray, np.ndarray], tuple[np.ndarray, Denominators]]
] = {"all": _of_all, "chosen": _of_chosen}
"""An algorithm's ``weights`` -> function of the samples, the block, the longest sequence, each sample's loss tokens and
those that count."""
