"""How the torch engine draws tokens from logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlflow.types import SamplingParams


def sample(logits: torch.Tensor, uniforms: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws by inverse transform: the first token at which the cumulative probability passes the uniform.

    Args:
        logits: [R, V].
        uniforms: float64 [R] in [0, 1).

    Returns:
        Tokens [R], and the logprobs [R] of the distribution they were drawn from: after temperature, top-k and top-p.
        Greedy tokens (temperature 0) come with their logprob at temperature 1.
    """
    logits = logits.float()
    if params.temperature == 0:
        logprobs = torch.log_softmax(logits, dim=-1)
        token = logits.argmax(dim=-1)
        return token, logprobs.gather(1, token[:, None]).squeeze(1)
    logits = logits / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        kth = logits.topk(params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if params.top_p < 1.0:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= params.top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    logprobs = torch.log_softmax(logits, dim=-1)
    cumulative = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
    token = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    token = token.clamp(max=logits.shape[-1] - 1)
    return token.squeeze(1), logprobs.gather(1, token).squeeze(1)


def sample_each(
    logits: torch.Tensor, uniforms: torch.Tensor, groups: Sequence[tuple[SamplingParams, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws for rows of unlike parameters.

    Args:
        logits: [R, V].
        uniforms: float64 [R].
        groups: Parameters, and the rows that have them, int [K] each; every row is in one group.

    Returns:
        Tokens [R] and their logprobs [R], as ``sample``.
    """
    if len(groups) == 1:
        return sample(logits, uniforms, groups[0][0])
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    logprobs = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for params, rows in groups:
        tokens[rows], logprobs[rows] = sample(logits[rows], uniforms[rows], params)
    return tokens, logprobs
