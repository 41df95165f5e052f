"""Per-token losses to one number: the weight of each token, computed once for a whole optimizer batch.

The loss is the sum over all tokens of ``weight * per_token_loss``. Because the denominators are those of the batch,
neither micro-batch size, nor packing, nor the number of ranks can change it.

A completion that is left out (truncated, unscored) has no loss token. By default it is not counted either: pass counts
of what is trained. With ``groups.count_masked`` it is: pass the counts it would have had, and weigh only what is
trained. TRL's dapo does the first, ms-swift the second; DAPO's paper does not say.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rlflow.types import Denominators


def count_denominators(counts: np.ndarray, groups: np.ndarray) -> Denominators:
    """Counts of one optimizer batch.

    Args:
        counts: int [S], loss tokens of each sequence.
        groups: int [S], the prompt (or pair) each sequence belongs to.
    """
    trained = counts > 0
    return Denominators(
        num_tokens=int(counts.sum()),
        num_sequences=int(trained.sum()),
        num_groups=len(np.unique(groups[trained])),
    )


def loss_weights(
    reduction: str, counts: np.ndarray, groups: np.ndarray, denominators: Denominators, max_new_tokens: int
) -> np.ndarray:
    """Weight of every loss token of each sequence.

    Args:
        reduction: A key of REDUCTIONS.
        counts: int [S], loss tokens of each sequence of the optimizer batch.
        groups: int [S], the prompt each sequence belongs to.
        denominators: Of the same counts and groups.
        max_new_tokens: Length that fixed_length divides by.

    Returns:
        float64 [S]; 0 for a sequence without loss tokens.
    """
    weights = REDUCTIONS[reduction](counts, groups, denominators, max_new_tokens)
    return np.where(counts > 0, weights, 0.0)


def preference_weights(
    reduction: str, counts: np.ndarray, labels: np.ndarray, max_new_tokens: int
) -> tuple[np.ndarray, Denominators]:
    """Weights of the likelihood term, which only the chosen answers have, and denominators of the whole batch.

    Args:
        counts: int [S], loss tokens of each sequence; pairs are adjacent, chosen first.
        labels: float [S], +1 chosen, -1 rejected.

    Returns:
        float64 [S], 0 for rejected answers; and the counts of all pairs, which the pairwise loss and metrics need.
    """
    pairs = np.arange(len(counts)) // 2
    chosen = np.where(labels > 0, counts, 0)
    weights = loss_weights(reduction, chosen, pairs, count_denominators(chosen, pairs), max_new_tokens)
    return weights, count_denominators(counts, pairs)


def _token(counts: np.ndarray, groups: np.ndarray, denominators: Denominators, max_new_tokens: int) -> np.ndarray:
    """Mean over all tokens: 1 / sum of |o_i| (DAPO, arXiv 2503.14476, eq. 8)."""
    return np.full(len(counts), 1.0 / max(1, denominators.num_tokens))


def _sequence(counts: np.ndarray, groups: np.ndarray, denominators: Denominators, max_new_tokens: int) -> np.ndarray:
    """Mean over sequences of their token means: 1 / (S |o_i|) (GRPO, arXiv 2402.03300, eq. 3)."""
    return 1.0 / (np.maximum(counts, 1) * max(1, denominators.num_sequences))


def _prompt(counts: np.ndarray, groups: np.ndarray, denominators: Denominators, max_new_tokens: int) -> np.ndarray:
    """Mean over prompts of the token means of their completions together (ScaleRL, arXiv 2510.13786)."""
    _, index = np.unique(groups, return_inverse=True)
    of_group = np.bincount(index, weights=counts)[index]
    return 1.0 / (np.maximum(of_group, 1) * max(1, denominators.num_groups))


def _fixed_length(
    counts: np.ndarray, groups: np.ndarray, denominators: Denominators, max_new_tokens: int
) -> np.ndarray:
    """Sum over tokens / (S * max_new_tokens): no length enters (Dr. GRPO, arXiv 2503.20783)."""
    return np.full(len(counts), 1.0 / (max(1, denominators.num_sequences) * max_new_tokens))


REDUCTIONS: dict[str, Callable[[np.ndarray, np.ndarray, Denominators, int], np.ndarray]] = {
    "token": _token,
    "sequence": _sequence,
    "prompt": _prompt,
    "fixed_length": _fixed_length,
}
"""``loss.reduction`` -> weights of each sequence's tokens."""
