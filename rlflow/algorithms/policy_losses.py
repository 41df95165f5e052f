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


def gmpo_loss(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    sequence_ids: torch.Tensor,
    num_sequences: int,
    low: float,
    high: float,
) -> torch.Tensor:
    """GMPO: the geometric mean of token ratios, each clipped before it (arXiv 2507.20673), at every token:

        -A exp(mean over the sequence of s min(s x, s clip(x, -low, high))),    x = log w, s = sign of A

    The bounds are of log-ratios: 0.4 lets ratios be within [exp(-0.4), exp(0.4)]. Where the clip never holds it is
    GSPO's ratio without a clip.

    Args:
        log_ratio: [N], logprobs - old_logprobs, with gradient.
        advantages: [N].
        sequence_ids: int64 [N], ascending.
        num_sequences: S.

    Returns:
        [N].
    """
    clipped = log_ratio.clamp(-low, high)
    held = torch.where(advantages > 0, torch.minimum(log_ratio, clipped), torch.maximum(log_ratio, clipped))
    return -advantages * _exp(segment_mean(held, sequence_ids, num_sequences)[sequence_ids])


def leaves_trust_region(
    divergence: str,
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    low: float,
    high: float,
) -> torch.Tensor:
    """DPPO's mask: where the update would go on, in its direction, beyond a divergence of the two policies
    (arXiv 2602.04879; its binary divergences are eq. 13 and 14).

    The divergence is that of the sampled token against all others, p against 1 - p:

        tv: |p - p_old|,    kl: p_old log(p_old / p) + (1 - p_old) log((1 - p_old) / (1 - p))

    Args:
        divergence: A key of BINARY_DIVERGENCES.
        logprobs, old_logprobs, advantages: [N].
        low, high: The largest divergence where A <= 0, and where A > 0.

    Returns:
        bool [N]: where the divergence exceeds its bound, and the token is more probable than before with A > 0, or less
        probable with A <= 0.
    """
    # Near 1 the rest 1 - p has no digits left in float32.
    new, old = (x.detach().double().clamp(max=0.0) for x in (logprobs, old_logprobs))
    moved = BINARY_DIVERGENCES[divergence](new, old)
    return torch.where(advantages > 0, (new > old) & (moved > high), (new < old) & (moved > low))


def _binary_tv(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return (new.exp() - old.exp()).abs()


def _binary_kl(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    rest_new, rest_old = (-torch.expm1(x.clamp(max=-1e-15)) for x in (new, old))
    return old.exp() * (old - new) + rest_old * (rest_old / rest_new).log()


BINARY_DIVERGENCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "tv": _binary_tv,
    "kl": _binary_kl,
}
"""``loss.divergence`` -> function of the logprobs [N] of the current and of the old policy."""


def dppo_loss(
    ratio: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor, outside: torch.Tensor, largest: float
) -> torch.Tensor:
    """DPPO: a token's gradient is kept or dropped by a divergence, not by its ratio (arXiv 2602.04879):

        -sg[M min(w, c)] A log pi

    Its gradient at tokens that are kept, with w <= c, is that of -w A.

    Args:
        ratio, logprobs, advantages: [N].
        outside: bool [N], where M is 0: leaves_trust_region.
        largest: c, which bounds the weight.

    Returns:
        [N]. Only its gradient means something.
    """
    weight = ratio.detach().clamp(max=largest).masked_fill(outside, 0.0)
    return -weight * advantages * logprobs


def clip_cov_loss(
    ratio: torch.Tensor, advantages: torch.Tensor, selected: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """Clip-Cov: PPO's clip, without the tokens whose covariance was chosen (arXiv 2505.22617, section 4.2).

    Args:
        ratio: [N], with gradient.
        advantages: [N].
        selected: bool [N]: selections.clip_cov.

    Returns:
        [N], 0 where selected.
    """
    return clip_loss(ratio, advantages, low, high).masked_fill(selected, 0.0)


def kl_cov_loss(
    ratio: torch.Tensor, log_ratio: torch.Tensor, advantages: torch.Tensor, selected: torch.Tensor, coef: float
) -> torch.Tensor:
    """KL-Cov: no clip, and a penalty of |log w| on the tokens of the largest covariances (arXiv 2505.22617, section
    4.2; the penalty's form is the authors' code's):

        -w A + (coef |log w| where selected)

    Args:
        ratio, log_ratio: [N], with gradient.
        advantages: [N].
        selected: bool [N]: selections.kl_cov.

    Returns:
        [N].
    """
    return -ratio * advantages + coef * log_ratio.abs().masked_fill(~selected, 0.0)


def demonstration_loss(logprobs: torch.Tensor, *, weighs_by_certainty: bool) -> torch.Tensor:
    """-phi log p of a demonstration's tokens; phi = sg[p (1 - p)] (CHORD-phi, arXiv 2508.11408), or 1.

    Args:
        logprobs: [N], with gradient.

    Returns:
        [N].
    """
    if not weighs_by_certainty:
        return -logprobs
    p = logprobs.detach().exp()
    return -p * (1.0 - p) * logprobs


def _exp(log_ratio: torch.Tensor) -> torch.Tensor:
    return torch.exp(log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))
