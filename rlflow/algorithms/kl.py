"""Schulman's estimators of the KL from the policy to the reference, per sampled token.

With r = pi_ref / pi at tokens sampled from pi, KL(pi || ref) = E[-log r] (http://joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlflow.algorithms.kl_reward import LOG_RATIO_BOUND


def k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """-log r: unbiased, of either sign. In a loss its gradient is 0 on average unless weighted (see unbiased)."""
    return logprobs - ref_logprobs


def k2(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """(log r)^2 / 2: biased as a value; its gradient is the KL's when the tokens are the policy's own."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """r - 1 - log r: unbiased and never negative (GRPO, arXiv 2402.03300, eq. 4)."""
    log_r = (ref_logprobs - logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return torch.expm1(log_r) - log_r


def absolute(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """|log r|: no estimate of the KL; a distance whose gradient has the same size wherever the two differ, and is 0
    where they are equal (verl's ``abs``)."""
    return (logprobs - ref_logprobs).abs()


def unbiased(kl: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """Weights an estimate with pi / pi_old, so that its gradient is the KL's (DeepSeek-V3.2, arXiv 2512.02556).

    E_old[pi/pi_old * k] is the KL under the current policy as a function of its parameters; without the weight, the
    dependence of the sampling distribution on the parameters is missing from the gradient.

    Args:
        kl: [N], k1 or k3.
        log_ratio: [N], token-level logprobs - old_logprobs, with gradient.
    """
    return torch.exp(log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)) * kl


KL_ESTIMATORS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "abs": absolute,
}
"""``kl.estimator`` -> function of logprobs [N] and ref_logprobs [N]."""
