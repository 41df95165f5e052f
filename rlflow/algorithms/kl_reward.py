"""The KL to the reference as a part of the reward. numpy, on the driver."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlflow.types import Sample

LOG_RATIO_BOUND = 20.0
"""Log-ratios are cut to +-20 before they are exponentiated: beyond, float32 gradients are noise or infinite."""


def kl_penalty(estimator: str, logprobs: np.ndarray, ref_logprobs: np.ndarray) -> np.ndarray:
    """Schulman's estimators of KL(policy || reference) at each sampled token; the numpy twin of ``kl.KL_ESTIMATORS``.

    Args:
        estimator: k1, k2, k3 or abs.
        logprobs: float [C], of the policy that sampled.
        ref_logprobs: float [C].

    Returns:
        float64 [C].
    """
    log_ratio = logprobs.astype(np.float64) - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    if estimator == "abs":
        return np.abs(log_ratio)
    assert estimator == "k3", estimator
    log_ratio = np.clip(log_ratio, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return np.expm1(-log_ratio) + log_ratio


def adapt_kl_coef(coef: float, kl: float, target: float, horizon: int, num_samples: int) -> float:
    """Proportional controller in log space towards a KL a sequence (arXiv 1909.08593, section 2.2):

        e = clip((KL - target) / target, -0.2, 0.2),    coef <- coef (1 + e num_samples / horizon)

    Args:
        coef: The step's.
        kl: Mean over the step's sequences of their summed k1, measured against the reference.
        num_samples: Sequences of the step.
    """
    error = float(np.clip(kl / target - 1.0, -0.2, 0.2))
    return coef * (1.0 + error * num_samples / horizon)


def policy_logprobs(sample: Sample) -> np.ndarray | None:
    """float32 [T]: of the policy before the update; the trainer's own where it computed them, else the engine's."""
    return sample.old_logprobs if sample.proximal_logprobs is None else sample.proximal_logprobs


def kl_of_sequences(samples: Sequence[Sample]) -> float:
    """Mean over the trained sequences of their summed log-ratio (k1) between policy and reference; those of one rollout
    are one."""
    kl: dict[int, float] = {}
    for index, sample in enumerate(samples):
        logprobs = policy_logprobs(sample)
        if sample.loss_mask.any() and sample.ref_logprobs is not None and logprobs is not None:
            row = index if sample.rollout is None else sample.rollout
            kl[row] = kl.get(row, 0.0) + float((logprobs - sample.ref_logprobs)[sample.loss_mask].sum())
    return float(np.mean(list(kl.values()))) if kl else 0.0
