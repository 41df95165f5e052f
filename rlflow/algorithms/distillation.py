"""What a policy learns from a teacher: an advantage for each of its own tokens, or a divergence of distributions.

N or M loss tokens, V tokens of the vocabulary.
"""

from __future__ import annotations

import math

import torch

from rlflow.algorithms.kl_reward import LOG_RATIO_BOUND


def teacher_advantages(logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, coef: float) -> torch.Tensor:
    """A_t = -coef (log pi(y_t) - log pi_T(y_t)), detached: the policy gradient with these advantages is that of
    coef KL(pi || pi_T) of single tokens, whose gradient reaches no later token (MiniLLM, arXiv 2306.08543, section 2.2,
    the single-step part).

    Log-ratios are cut to +-20, so that a token that the teacher all but rules out is no infinite advantage.

    Args:
        logprobs: [N], of the policy that is updated, before the update.
        teacher_logprobs: [N].

    Returns:
        [N], without gradient.
    """
    log_ratio = logprobs.detach() - teacher_logprobs
    return -coef * log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def generalized_jsd(logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, beta: float) -> torch.Tensor:
    """The generalised Jensen-Shannon divergence of each token's distributions (GKD, arXiv 2306.13649, eq. 1):

        JSD_beta(T || S) = beta KL(T || M) + (1 - beta) KL(S || M),    M = beta T + (1 - beta) S

    and at its ends, where that is 0, the KLs that it approaches when divided by beta or by 1 - beta, as TRL and the
    paper's experiments have them: 0 is the forward KL(T || S), 1 the reverse KL(S || T).

    Args:
        logprobs: [M, V], the policy's, with gradient: of the whole vocabulary, or of buckets.
        teacher_logprobs: [M, V].

    Returns:
        [M], in nats.
    """
    if beta == 0.0:
        return _kl(teacher_logprobs, logprobs)
    if beta == 1.0:
        return _kl(logprobs, teacher_logprobs)
    mixture = torch.logaddexp(teacher_logprobs + math.log(beta), logprobs + math.log1p(-beta))
    return beta * _kl(teacher_logprobs, mixture) + (1.0 - beta) * _kl(logprobs, mixture)


def _kl(of: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """KL(of || to) = sum of p (log p - log q), [M]."""
    return (of.exp() * (of - to)).sum(dim=-1)


def with_tail(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Logprobs of some tokens, and of all others together as one more: a distribution again, unlike renormalised ones.

    Args:
        logits: float [M, V].
        ids: int64 [M, k], fewer than V of each row, all different.

    Returns:
        [M, k + 1].
    """
    total = torch.logsumexp(logits, dim=-1, keepdim=True)
    others = logits.scatter(1, ids, -math.inf)
    columns = [logits.gather(1, ids), torch.logsumexp(others, dim=-1, keepdim=True)]
    return torch.cat(columns, dim=1) - total


def tail_of(logprobs: torch.Tensor) -> torch.Tensor:
    """log(1 - sum of p) of logprobs [M, k] -> [M, 1], no less than that of what float32 rounds away."""
    rest = 1.0 - logprobs.double().exp().sum(dim=-1, keepdim=True)
    return rest.clamp(min=torch.finfo(torch.float32).eps).log().to(logprobs.dtype)
