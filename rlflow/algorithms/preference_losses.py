"""Losses of judged answers: one number a pair, or an answer.

``chosen`` and ``rejected`` are scores [B]: an answer's summed log-ratio log pi(y|x) - log pi_ref(y|x), or its mean over
tokens, or without the reference, as the recipe says. beta times a score is the implicit reward.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

LARGEST_EXPONENT = 80.0
"""exp of more has no float32."""


def forward_kl(log_ratios: torch.Tensor) -> torch.Tensor:
    """f'(t) = 1 - 1 / t at t = pi / pi_ref, of the forward KL, f(t) = -log t (f-DPO, arXiv 2309.16240, table 1; that of
    the KL itself is log t, but for a constant)."""
    return -torch.expm1((-log_ratios).clamp(max=LARGEST_EXPONENT))


def jensen_shannon(log_ratios: torch.Tensor) -> torch.Tensor:
    """f'(t) = log(2 t / (t + 1)) at t = pi / pi_ref (f-DPO, arXiv 2309.16240, table 1)."""
    return math.log(2.0) + F.logsigmoid(log_ratios)


DIVERGENCES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "reverse_kl": lambda log_ratios: log_ratios,
    "forward_kl": forward_kl,
    "js": jensen_shannon,
}
"""``preference.divergence`` -> score [S] of an answer from its summed log-ratio."""


def sigmoid(
    chosen: torch.Tensor, rejected: torch.Tensor, beta: float, label_smoothing: float = 0.0, margin: float = 0.0
) -> torch.Tensor:
    """-(1 - eps) log sigmoid(z) - eps log sigmoid(-z),  z = beta (chosen - rejected) - margin.

    DPO (arXiv 2305.18290, eq. 7); with eps the conservative form of its authors (https://ericmitchell.ai/cdpo.pdf);
    without reference CPO's preference term (arXiv 2401.08417, eq. 3); with mean logprobs and a margin SimPO
    (arXiv 2405.14734, eq. 6).
    """
    logits = beta * (chosen - rejected) - margin
    return -(1.0 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def hinge(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """max(0, 1 - beta (chosen - rejected)) (RSO's hinge-norm, arXiv 2309.06657; SLiC without reference)."""
    return torch.relu(1.0 - beta * (chosen - rejected))


def ipo(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """(chosen - rejected - 1 / (2 beta))^2, beta being the paper's tau (arXiv 2310.12036, eq. 17)."""
    return (chosen - rejected - 1.0 / (2.0 * beta)) ** 2


def robust(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, label_smoothing: float) -> torch.Tensor:
    """((1 - eps) L(w, l) - eps L(l, w)) / (1 - 2 eps), L DPO's: unbiased when eps labels flip (arXiv 2403.00409)."""
    right, flipped = sigmoid(chosen, rejected, beta), sigmoid(rejected, chosen, beta)
    return ((1.0 - label_smoothing) * right - label_smoothing * flipped) / (1.0 - 2.0 * label_smoothing)


def exo_pair(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, label_smoothing: float) -> torch.Tensor:
    """KL((sigmoid(z), sigmoid(-z)) || (1 - eps, eps)),  z = beta (chosen - rejected) (arXiv 2402.00856, eq. 16)."""
    if not label_smoothing > 0.0:
        raise ValueError("exo_pair takes the logarithm of label_smoothing: set it above 0 (the paper: 1e-3)")
    log_p, log_q = F.logsigmoid(beta * (chosen - rejected)), F.logsigmoid(beta * (rejected - chosen))
    return log_p.exp() * (log_p - math.log1p(-label_smoothing)) + log_q.exp() * (log_q - math.log(label_smoothing))


def nca_pair(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """-log sigmoid(r_w) - 1/2 log sigmoid(-r_w) - 1/2 log sigmoid(-r_l),  r = beta score (arXiv 2402.05369)."""
    both = F.logsigmoid(-beta * chosen) + F.logsigmoid(-beta * rejected)
    return -F.logsigmoid(beta * chosen) - 0.5 * both


def bco_pair(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """-log sigmoid(r_w) - log sigmoid(-r_l) (arXiv 2404.04656), with the paper's reward shift at 0, as TRL has it."""
    return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)


def sppo(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """(chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2 (arXiv 2405.00675, eq. 4.7, P = 1 for the winner)."""
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def aot(
    chosen: torch.Tensor, rejected: torch.Tensor, matched: torch.Tensor, beta: float, label_smoothing: float = 0.0
) -> torch.Tensor:
    """DPO's loss of a pair against the reference's pair of equal rank (arXiv 2406.05882, paired).

    Args:
        chosen, rejected: [B], log-ratios against the pair's own reference.
        matched: [B], by how much the reference of equal rank exceeds the pair's own (preference_targets.aot_margins).
    """
    return sigmoid(chosen - rejected, matched, beta, label_smoothing)


def aot_unpaired(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    rejected_of_rank: torch.Tensor,
    chosen_of_rank: torch.Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """DPO's loss of the chosen and the rejected answers of equal rank (arXiv 2406.05882, unpaired).

    Each answer meets its partner as a number, because that one may be in another micro-batch. A comparison is thus
    made twice, once with either side's gradient: half of the values' sum, and all of the gradients'.

    Args:
        chosen, rejected: [B].
        rejected_of_rank: [B], the rejected score of each chosen answer's rank (preference_targets.aot_partners).
        chosen_of_rank: [B], the chosen score of each rejected answer's rank.
    """
    of_chosen = sigmoid(chosen, rejected_of_rank, beta, label_smoothing)
    twice = of_chosen + sigmoid(chosen_of_rank, rejected, beta, label_smoothing)
    return twice - 0.5 * twice.detach()


def apo_zero(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """1 - sigmoid(r_w) + sigmoid(r_l): chosen up, rejected down (arXiv 2408.06266, eq. 7)."""
    return 1.0 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """sigmoid(r_w) + 1 - sigmoid(r_w - r_l): both down, rejected more (arXiv 2408.06266, eq. 8)."""
    return torch.sigmoid(beta * chosen) + 1.0 - torch.sigmoid(beta * (chosen - rejected))


def discopop(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, tau: float = 0.05) -> torch.Tensor:
    """(1 - m) (-log sigmoid(z)) + m exp(-z),  m = sigmoid(z / tau),  z = beta (chosen - rejected)
    (arXiv 2406.08414, eq. 5). Not convex: at z = 0, where training starts, it rises with z."""
    logits = beta * (chosen - rejected)
    mix = torch.sigmoid(logits / tau)
    return -F.logsigmoid(logits) * (1.0 - mix) + torch.exp(-logits) * mix


def orpo(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """-beta log sigmoid(log odds(y_w) - log odds(y_l)),  odds = p / (1 - p) (arXiv 2403.07691, eq. 4 to 7).

    Args:
        chosen, rejected: [B], mean logprobs over an answer's tokens, no reference subtracted: log p <= 0.
    """
    return -beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def kto(
    scores: torch.Tensor,
    labels: torch.Tensor,
    kl: torch.Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """lambda_D (1 - sigmoid(beta (r - z0))) where desirable, lambda_U (1 - sigmoid(beta (z0 - r))) where not
    (arXiv 2402.01306, eq. 8).

    Args:
        scores: [B], r, summed log-ratios.
        labels: [B], +1 desirable, -1 undesirable.
        kl: z0, of the whole batch (preference_targets.kto_kl).
    """
    weight = torch.full_like(scores, undesirable_weight).masked_fill(labels > 0, desirable_weight)
    return weight * torch.sigmoid(-labels * beta * (scores - kl))


def bradley_terry(
    chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | float = 0.0, center_coef: float = 0.0
) -> torch.Tensor:
    """-log sigmoid(r_w - r_l - m) + c (r_w + r_l)^2: a reward model's loss.

    InstructGPT (arXiv 2203.02155, eq. 1), Llama 2's margin (arXiv 2307.09288, eq. 2), centring as in arXiv 2312.09244.

    Args:
        chosen, rejected: [B], the model's rewards.
        margin: [B] or a number.
    """
    return -F.logsigmoid(chosen - rejected - margin) + center_coef * (chosen + rejected) ** 2


def _log_odds(logprobs: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of log p <= 0, accurate at both ends."""
    logprobs = logprobs.clamp(max=-torch.finfo(logprobs.dtype).eps)
    log_rest = torch.where(
        logprobs > -math.log(2.0), torch.log(-torch.expm1(logprobs)), torch.log1p(-torch.exp(logprobs))
    )
    return logprobs - log_rest
