"""What a loss needs to know of its whole batch before the update, from a forward pass. numpy, on the driver.

rows ------> units ---------------------------------> samples with their targets
example      (example,)                               as they are
pair         (chosen, rejected)                       aot, aot_unpaired: numbers by rank; other losses: as they are
labelled     (answer, another's answer to its prompt) the answers alone, each with the batch's KL
judged       (answer,)                               as they are, with 0 in the place of the KL
related      (anchor, documents)                      as they are, each with the number of its text
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from rlflow.algorithms.preference_targets import aot_margins, aot_partners, kto_kl
from rlflow.recipe import AlgorithmBlock, PairBlock
from rlflow.types import Sample

Unit = tuple[Sample, ...]
"""The samples that one row became."""
LogprobsOf = Callable[[Sequence[Sample]], Sequence[np.ndarray]]
"""The current policy's logprobs, [T] of each sample."""


def with_targets(units: Sequence[Unit], algorithm: AlgorithmBlock, logprobs_of: LogprobsOf) -> list[Sample]:
    """The samples that the units train, each with its unit's number as its group and with what the loss looks at."""
    numbered = [tuple(replace(sample, group=number) for sample in unit) for number, unit in enumerate(units)]
    return BATCH_TARGETS[algorithm.learning.batch_targets](numbered, algorithm, logprobs_of)


def _as_they_are(units: Sequence[Unit], algorithm: AlgorithmBlock, logprobs_of: LogprobsOf) -> list[Sample]:
    return [sample for unit in units for sample in unit]


def _without_rewards(units: Sequence[Unit], algorithm: AlgorithmBlock, logprobs_of: LogprobsOf) -> list[Sample]:
    """Nothing was rewarded: what is learned comes from elsewhere than advantages."""
    samples = _as_they_are(units, algorithm, logprobs_of)
    return [replace(sample, advantages=np.zeros(len(sample.token_ids), dtype=np.float32)) for sample in samples]


def _of_pair_loss(units: Sequence[Unit], algorithm: AlgorithmBlock, logprobs_of: LogprobsOf) -> list[Sample]:
    assert isinstance(algorithm, PairBlock)
    return PAIR_TARGETS.get(algorithm.preference.loss, _as_they_are)(units, algorithm, logprobs_of)


def _rank_margins(units: Sequence[Unit], algorithm: AlgorithmBlock, logprobs_of: LogprobsOf) -> list[Sample]:
    """AOT: how much the reference of equal rank exceeds each pair's own."""
    samples, scores, references = _scores(units, algorithm, logprobs_of)
    margins = np.repeat(aot_margins(scores[::2] - scores[1::2], references[::2] - references[1::2]), 2)
    return [replace(sample, rank_margin=float(margin)) for sample, margin in zip(samples, margins, strict=True)]


def _rank_partners(units: Sequence[Unit], algorithm: AlgorithmBlock, logprobs_of: LogprobsOf) -> list[Sample]:
    """AOT unpaired: the score of the other side's answer of equal rank."""
    samples, scores, references = _scores(units, algorithm, logprobs_of)
    ratios = scores - references
    partners = np.stack(aot_partners(ratios[::2], ratios[1::2]), axis=1).ravel()
    return [replace(sample, rank_partner=float(score)) for sample, score in zip(samples, partners, strict=True)]


def _mismatched_kl(units: Sequence[Unit], algorithm: AlgorithmBlock, logprobs_of: LogprobsOf) -> list[Sample]:
    """KTO: the KL of the mismatched pairs, which are not trained themselves."""
    mismatched = [other for _, other in units if other.loss_mask.any()]
    kl = 0.0
    if mismatched:
        logprobs = logprobs_of(mismatched)
        kl = kto_kl(_sums(mismatched, logprobs), _sums(mismatched, [_reference(sample) for sample in mismatched]))
    return [replace(answer, batch_kl=kl) for answer, _ in units]


def _zero(units: Sequence[Unit], algorithm: AlgorithmBlock, logprobs_of: LogprobsOf) -> list[Sample]:
    """APO-zero: an answer is compared with 0 in the place of a KL."""
    return [replace(sample, batch_kl=0.0) for unit in units for sample in unit]


def _numbered_texts(units: Sequence[Unit], algorithm: AlgorithmBlock, logprobs_of: LogprobsOf) -> list[Sample]:
    """Which samples have the same tokens: a document of one row is no negative of another whose positive it is."""
    samples = _as_they_are(units, algorithm, logprobs_of)
    first: dict[bytes, int] = {}
    return [
        replace(sample, text=first.setdefault(sample.token_ids.tobytes(), index))
        for index, sample in enumerate(samples)
    ]


BATCH_TARGETS: dict[str, Callable[[Sequence[Unit], AlgorithmBlock, LogprobsOf], list[Sample]]] = {
    "none": _as_they_are,
    "no_rewards": _without_rewards,
    "pair_loss": _of_pair_loss,
    "mismatched_kl": _mismatched_kl,
    "zero_kl": _zero,
    "texts": _numbered_texts,
}
"""An algorithm's ``batch_targets`` -> function."""
PAIR_TARGETS: dict[str, Callable[[Sequence[Unit], AlgorithmBlock, LogprobsOf], list[Sample]]] = {
    "aot": _rank_margins,
    "aot_unpaired": _rank_partners,
}
"""``preference.loss`` -> function; the other losses look at a pair alone."""


def _scores(
    units: Sequence[Unit], algorithm: AlgorithmBlock, logprobs_of: LogprobsOf
) -> tuple[list[Sample], np.ndarray, np.ndarray]:
    """The samples, and float64 [S] of each by the policy and by the reference: sums of logprobs, or means."""
    samples = _as_they_are(units, algorithm, logprobs_of)
    scores = _sums(samples, logprobs_of(samples))
    references = _sums(samples, [_reference(sample) for sample in samples])
    if isinstance(algorithm, PairBlock) and algorithm.preference.length_normalized:
        lengths = np.array([max(1, sample.loss_mask.sum()) for sample in samples])
        scores, references = scores / lengths, references / lengths
    return samples, scores, references


def _sums(samples: Sequence[Sample], logprobs: Sequence[np.ndarray]) -> np.ndarray:
    """float64 [S]: over each sample's loss tokens."""
    return np.array([values[s.loss_mask].sum(dtype=np.float64) for s, values in zip(samples, logprobs, strict=True)])


def _reference(sample: Sample) -> np.ndarray:
    return np.zeros(len(sample.token_ids)) if sample.ref_logprobs is None else sample.ref_logprobs
