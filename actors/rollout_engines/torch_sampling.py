"""How the torch engine draws tokens from logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlflow.types import SamplingParams


@dataclass(frozen=True, slots=True)
class AlikeRows:
    """Rows that are drawn in the same way."""

    params: SamplingParams
    rows: torch.Tensor
    """int [K]: which rows."""
    seen: torch.Tensor | None = None
    """bool [K, V]: tokens that each has in its prompt and its completion; with a repetition penalty."""


def sample(
    logits: torch.Tensor, uniforms: torch.Tensor, params: SamplingParams, seen: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws by inverse transform: the first token at which the cumulative probability passes the uniform.

    Args:
        logits: [R, V].
        uniforms: float64 [R] in [0, 1).
        seen: bool [R, V]: what the repetition penalty is of, where there is one.

    Returns:
        Tokens [R], and the logprobs [R] of the distribution they were drawn from: after repetition penalty,
        temperature, min-p, top-k and top-p. Greedy tokens (temperature 0) come with their logprob at temperature 1.
    """
    logits = logits.float()
    if seen is not None:
        penalty = params.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if params.temperature == 0:
        logprobs = torch.log_softmax(logits, dim=-1)
        token = logits.argmax(dim=-1)
        return token, logprobs.gather(1, token[:, None]).squeeze(1)
    logits = logits / params.temperature
    if params.min_p > 0:
        least = logits.max(dim=-1, keepdim=True).values + math.log(params.min_p)
        logits = logits.masked_fill(logits < least, -torch.inf)
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
    logits: torch.Tensor, uniforms: torch.Tensor, groups: Sequence[AlikeRows]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws for rows of unlike parameters.

    Args:
        logits: [R, V].
        uniforms: float64 [R].
        groups: Every row is in one of them.

    Returns:
        Tokens [R] and their logprobs [R], as ``sample``.
    """
    if len(groups) == 1:
        return sample(logits, uniforms, groups[0].params, groups[0].seen)
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    logprobs = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for group in groups:
        rows = group.rows
        tokens[rows], logprobs[rows] = sample(logits[rows], uniforms[rows], group.params, group.seen)
    return tokens, logprobs
