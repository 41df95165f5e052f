"""What preference losses need to know of the whole batch, computed once from a forward pass. numpy, on the driver.

The numbers travel to the loss with each sample, so that no split into micro-batches can change them.
"""

from __future__ import annotations

import numpy as np


def kto_kl(logprobs: np.ndarray, ref_logprobs: np.ndarray) -> float:
    """KTO's reference point z0 (arXiv 2402.01306, section 4.1): the mean log-ratio of mismatched pairs, at least 0.

    Args:
        logprobs: float [S], summed over the completion of example i + 1 given the prompt of example i.
        ref_logprobs: float [S], the reference's.
    """
    return max(0.0, float(np.mean(logprobs.astype(np.float64) - ref_logprobs)))


def aot_margins(log_ratios: np.ndarray, ref_log_ratios: np.ndarray) -> np.ndarray:
    """AOT compares sorted with sorted (arXiv 2406.05882): pair i with the reference's log-ratio of its rank.

    Args:
        log_ratios: float [B], logprobs of chosen minus rejected under the policy.
        ref_log_ratios: float [B], the same under the reference.

    Returns:
        float [B]: by how much the reference's log-ratio of a pair's rank exceeds the pair's own. 0 makes AOT DPO.
    """
    return _of_equal_rank(log_ratios, ref_log_ratios) - ref_log_ratios


def aot_partners(chosen: np.ndarray, rejected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AOT unpaired compares sorted chosen with sorted rejected answers (arXiv 2406.05882): each with that of its rank.

    Args:
        chosen, rejected: float [B], scores.

    Returns:
        float [B] each: a rejected answer's score for every chosen one, and a chosen answer's for every rejected one.
    """
    return _of_equal_rank(chosen, rejected), _of_equal_rank(rejected, chosen)


def _of_equal_rank(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[B]: for each value, the one of ``others`` [B] that has its rank."""
    matched = np.empty_like(others)
    matched[np.argsort(values, kind="stable")] = np.sort(others)
    return matched
