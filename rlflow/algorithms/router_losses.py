"""What keeps the experts of a mixture-of-experts model in use. Per sequence, so that no split of a batch can change it.

Every token of a sequence counts, those of the prompt too: the router sees no difference. There are E experts,
of which a token takes K.
"""

from __future__ import annotations

import torch


def balance_loss(choices: torch.Tensor, scores: torch.Tensor, num_chosen: int) -> torch.Tensor:
    """Sequence-wise load balance: sum_i f_i P_i (DeepSeek-V3, arXiv 2412.19437, eq. 17-20, without its alpha).

    f_i = E / (K T) * the tokens of the sequence that chose expert i; P_i = the mean over its T tokens of the
    normalised score of expert i. 1 when every expert gets as much, at most E / K; the gradient flows through P alone.

    Args:
        choices: [S, E], share of each sequence's tokens that chose an expert: means of ``one_hot_choices``.
        scores: [S, E], mean score over each sequence's tokens, of a softmax.
        num_chosen: K.

    Returns:
        [S].
    """
    return choices.shape[1] / num_chosen * (choices * scores).sum(dim=1)


def z_loss(logits: torch.Tensor) -> torch.Tensor:
    """logsumexp(logits)^2 of each token (ST-MoE, arXiv 2202.08906, eq. 5, which averages it over a batch).

    Args:
        logits: [N, E].

    Returns:
        [N].
    """
    return torch.logsumexp(logits, dim=1).square()


def one_hot_choices(chosen: torch.Tensor, num_experts: int) -> torch.Tensor:
    """int [N, K] -> float32 [N, E]: 1 where a token goes to an expert."""
    hits = torch.zeros(len(chosen), num_experts, device=chosen.device)
    return hits.scatter_(1, chosen, 1.0)
