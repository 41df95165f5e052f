"""What a set's verdicts say, and how sure that is. Plain arithmetic over problems and their samples."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb, sqrt
from statistics import NormalDist

import numpy as np

_MOST_VOTES = 1000
"""Subsets of a problem's samples that vote, where there are more."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems, in [0, 1]."""

    value: float
    low: float
    high: float
    """Of its confidence interval."""
    num_problems: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def estimate(values_P: Sequence[float], confidence: float = 0.95) -> Estimate:
    r"""The mean of numbers in [0, 1], one a problem, with its confidence interval over draws of problems.

    Wilson's score interval with the effective number of problems $n_e = p (1 - p) / s^2$, $s$ being the standard error
    of the mean (Dean and Pagano 2015, Journal of Survey Statistics and Methodology 3). Of verdicts of 0 or 1 it is
    Wilson's own with n - 1 in the place of n, and narrower where several samples a problem say more than one. Where all
    numbers are the same nobody knows their spread: then $n_e = n$, and the interval of 0 of n is no point.

    Raises:
        ValueError: There are no values.
    """
    values = np.asarray(values_P, dtype=np.float64)
    num = len(values)
    if not num:
        raise ValueError("there are no problems to take the mean of")
    mean = float(values.mean())
    variance = float(values.var(ddof=1)) / num if num > 1 else 0.0
    effective = mean * (1 - mean) / variance if variance > 1e-15 else float(num)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    center = (mean + z * z / (2 * effective)) / (1 + z * z / effective)
    reach = z / (1 + z * z / effective) * sqrt(mean * (1 - mean) / effective + z * z / (4 * effective**2))
    return Estimate(mean, max(0.0, min(mean, center - reach)), min(1.0, max(mean, center + reach)), num)


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Unbiased estimate that at least one of k samples passes: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, eq. 1).

    Raises:
        ValueError: k is not between 1 and the number of samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem, and there are {num_samples}")
    return 1.0 - comb(num_samples - num_passed, k) / comb(num_samples, k)


def majority_at_k(answers_G: Sequence[Hashable | None], passed_G: Sequence[bool], k: int) -> float:
    """How often the most frequent answer of k samples is right, over all subsets of k, or 1,000 drawn ones.

    Answers that pass are one answer, however they are written: all of them equal the reference. A sample without an
    answer has no vote; a tie is drawn for, which here is the share of it that is right.

    Raises:
        ValueError: k is not between 1 and the number of samples.
    """
    num = len(answers_G)
    if not 1 <= k <= num:
        raise ValueError(f"maj@{k} needs at least {k} samples a problem, and there are {num}")
    votes = [True if passed else answer for answer, passed in zip(answers_G, passed_G, strict=True)]
    if comb(num, k) <= _MOST_VOTES:
        subsets = list(combinations(range(num), k))
    else:
        draw = np.random.default_rng(0)
        subsets = [tuple(draw.permutation(num)[:k]) for _ in range(_MOST_VOTES)]
    return float(np.mean([_right_share([votes[i] for i in subset]) for subset in subsets]))


def _right_share(votes: Sequence[Hashable | None]) -> float:
    """Of a vote: 1 where the right answer wins, 0 where it loses, its share of a tie."""
    counts: dict[Hashable, int] = {}
    for vote in votes:
        if vote is not None:
            counts[vote] = counts.get(vote, 0) + 1
    most = max(counts.values(), default=0)
    first = [vote for vote, count in counts.items() if count == most]
    return first.count(True) / len(first) if first else 0.0
