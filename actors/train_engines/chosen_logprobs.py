"""Log-probabilities of chosen tokens out of their logits, in the memory of the logits, and the same of the gradient.

Composed of torch's operations they need three more arrays of the logits' size, and write each to memory and read it
again; here a few rows at a time go through all steps while the processor's cache has them.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

Entropies = Literal["none", "values", "gradient"]
"""Whether they are wanted, and with a gradient."""

_BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}
"""Logits that go through all steps together: on a CPU what its cache holds, on a GPU what keeps it busy."""


def chosen_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, left_out: torch.Tensor | None, entropies: Entropies
) -> tuple[torch.Tensor, ...]:
    """``log softmax(scale * logits)[target]`` [M], and the distributions' entropies in nats [M] where they are wanted.

    Args:
        logits: float32 [M, V]. Their memory is taken over: nothing may read them afterwards, which includes the
            backward pass of the operation that made them.
        targets: int [M].
        left_out: bool [V]: ids that get no probability.
    """
    chosen, of_rows = _ChosenLogprobs.apply(logits, targets.long()[:, None], scale, left_out, entropies)
    return (chosen,) if entropies == "none" else (chosen, of_rows)


class _ChosenLogprobs(torch.autograd.Function):
    """With p = softmax(scale * z) and the entropy H = -sum p log p:

    d log p_t / d z_j = scale * ([j = t] - p_j), and d H / d z_j = -scale * p_j * (log p_j + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        scale: float,
        left_out: torch.Tensor | None,
        entropies: Entropies,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        of_rows = logits.new_zeros(len(logits))
        for rows in _blocks(logits):
            block = logits[rows]
            if scale != 1.0:
                block.mul_(scale)
            if left_out is not None:
                # Not infinity, whose product with a probability of 0 is no entropy.
                block.masked_fill_(left_out, torch.finfo(torch.float32).min)
            logprobs = torch.log_softmax(block, dim=-1)
            block.copy_(logprobs)
            if entropies != "none":
                of_rows[rows] = -logprobs.exp_().mul_(block).sum(dim=-1)
        if entropies != "gradient":
            ctx.mark_non_differentiable(of_rows)
        ctx.set_materialize_grads(False)
        ctx.scale = scale
        ctx.save_for_backward(logits, targets, left_out, of_rows)
        return logits.gather(1, targets).squeeze(1), of_rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_chosen: torch.Tensor | None, of_entropies: torch.Tensor | None) -> tuple[Any, ...]:
        # They are written over, and torch refuses to read them a second time.
        logprobs, targets, left_out, entropies = ctx.saved_tensors
        if of_chosen is None:
            of_chosen = torch.zeros(len(logprobs), device=logprobs.device)
        for rows in _blocks(logprobs):
            block, weights = logprobs[rows], ctx.scale * of_chosen[rows, None]
            if of_entropies is None:
                block.exp_().mul_(-weights)
            else:
                factors = (block + entropies[rows, None]).mul_(ctx.scale * of_entropies[rows, None]).add_(weights)
                block.exp_().mul_(-factors)
            block.scatter_add_(1, targets[rows], weights)
            if left_out is not None:
                block.masked_fill_(left_out, 0.0)
        return logprobs, None, None, None, None


def _blocks(logits: torch.Tensor) -> list[slice]:
    num_rows, size = logits.shape
    step = max(1, _BLOCK_ELEMENTS.get(logits.device.type, 1 << 19) // size)
    return [slice(start, start + step) for start in range(0, num_rows, step)]
