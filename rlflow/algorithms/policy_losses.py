"""Importance ratios, and the per-token losses of the online algorithms. N loss tokens, S sequences."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlflow.algorithms.batch import segment_mean, segment_sum
from rlflow.algorithms.kl_reward import LOG_RATIO_BOUND


def token_ratio(log_ratio: torch.Tensor, sequence_ids: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """w_t = pi(y_t) / pi_old(y_t) (PPO, arXiv 1707.06347, eq. 6).

    Args:
        log_ratio: [N], logprobs - old_logprobs, with gradient.
        sequence_ids: int64 [N], ascending.
        num_sequences: S.

    Returns:
        [N]. The same of all four.
    """
    return _exp(log_ratio)


def sequence_ratio(log_ratio: torch.Tensor, sequence_ids: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """s = (pi(y) / pi_old(y))^(1/|y|), the geometric mean, at every token (GSPO, arXiv 2507.18071, eq. 7)."""
    return _exp(segment_mean(log_ratio, sequence_ids, num_sequences)[sequence_ids])


def sequence_token_ratio(log_ratio: torch.Tensor, sequence_ids: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """s_t = sg[s] pi(y_t) / sg[pi(y_t)]: GSPO's value with a token's gradient (GSPO-token, eq. 14)."""
    mean = segment_mean(log_ratio.detach(), sequence_ids, num_sequences)[sequence_ids]
    # The difference is exactly 0 and must be added last: a large log-ratio first would round the mean away.
    return _exp(mean + (log_ratio - log_ratio.detach()))


def sequence_product_ratio(log_ratio: torch.Tensor, sequence_ids: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """pi(y) / pi_old(y): the whole answer is one action (RLOO, arXiv 2402.14740)."""
    return _exp(segment_sum(log_ratio, sequence_ids, num_sequences)[sequence_ids])


RATIOS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "token": token_ratio,
    "sequence": sequence_ratio,
    "sequence_token": sequence_token_ratio,
    "sequence_product": sequence_product_ratio,
}
"""``loss.ratio`` -> function."""


def clip_loss(
    ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float, dual: float | None = None
) -> torch.Tensor:
    """PPO's pessimistic bound (arXiv 1707.06347, eq. 7), with bounds of its own for each side (DAPO, eq. 10):

        -min(w A, clip(w, 1 - low, 1 + high) A)

    and, with ``dual`` = c > 1, for A < 0 no more than -c A (dual clip, arXiv 1912.09729, eq. 5).

    Args:
        ratio: [N], with gradient.
        advantages: [N].

    Returns:
        [N].
    """
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1.0 - low, 1.0 + high) * advantages)
    if dual is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual * advantages), loss)


def cispo_loss(
    ratio: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """CISPO: the weight is clipped, no token's gradient is (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5):

        -sg[clip(w, 1 - low, 1 + high)] A log pi

    Args:
        ratio, logprobs, advantages: [N].

    Returns:
        [N]. Only its gradient means something.
    """
    return -ratio.detach().clamp(1.0 - low, 1.0 + high) * advantages * logprobs


def sapo_loss(ratio: torch.Tensor, advantages: torch.Tensor, tau_positive: float, tau_negative: float) -> torch.Tensor:
    """SAPO: a smooth gate instead of a clip (arXiv 2511.20347, eq. 5 and 6):

        -sigmoid(tau (w - 1)) (4 / tau) A,    tau = tau_positive for A > 0, tau_negative otherwise

    Its slope at w = 1 is that of -w A.

    Args:
        ratio: [N], with gradient.
        advantages: [N].

    Returns:
        [N].
    """
    tau = torch.full_like(ratio, tau_negative).masked_fill(advantages > 0, tau_positive)
    return -torch.sigmoid(tau * (ratio - 1.0)) * (4.0 / tau) * advantages


def _exp(log_ratio: torch.Tensor) -> torch.Tensor:
    return torch.exp(log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))
