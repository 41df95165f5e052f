"""Ulysses sequence parallelism (arXiv 2309.14509): P ranks share each micro-batch's tokens, and its attention heads.

All P ranks are given the whole micro-batch; each runs the decoder on a slice of its tokens and keeps that share of the
activations. Attention, which looks across tokens, has all tokens of a share of the heads instead:

    [N/P, H, D]  --all-to-all->  [N, H/P, D]  --packed attention->  [N, H/P, D]  --all-to-all->  [N/P, H, D]

What the model says of tokens (logprobs, values, scores) is summed over the P ranks, which then compute the same loss of
the whole micro-batch. A rank's gradient is what comes through its tokens and heads: a share of a sum over all ranks, as
an engine wants it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from rlflow.actors.train_engines.decoder_passes import DecoderPasses
from rlflow.actors.train_engines.packed_attention import PackedLayout
from rlflow.actors.train_engines.tower import Tower
from rlflow.recipe.token_shares import heads_problem, sharing_problem


@dataclass(frozen=True, slots=True)
class SequenceRanks:
    """The ranks that share a micro-batch's tokens: P neighbours."""

    group: dist.ProcessGroup
    size: int
    """P."""
    index: int
    """Of this rank among them."""


class SplitModule(Protocol):
    """A TokenModel or ScalarModel."""

    model: Any
    passes: DecoderPasses
    ranks: SequenceRanks | None
    tower: Tower | None

    def hidden_states(
        self, token_ids: torch.Tensor, position_ids: torch.Tensor, layout: PackedLayout
    ) -> torch.Tensor: ...


def share_tokens(module: SplitModule, size: int, device: torch.device, timeout_s: float) -> None:
    """From now on ``size`` neighbouring ranks share every micro-batch. All ranks call it, before an engine shards.

    Raises:
        ValueError: The model's heads do not divide, or it mixes tokens in other ways than by attention.
    """
    name = type(module.model).__name__
    if problem := sharing_problem(module.model.config.to_dict(), size):
        raise ValueError(f"{name}: {problem}")
    if not module.passes.packs or module.passes.names_boundaries:
        raise ValueError(
            f"{name}: ranks can share what attention alone mixes "
            f"({module.passes.reason or 'its layers carry a state'}): set trainer.sequence_parallel: 1"
        )
    if module.tower is not None:
        reason = "ranks share each sequence's tokens: set trainer.sequence_parallel: 1"
        if module.tower.is_always_run:
            raise ValueError(f"{name}: model.train names the tower or the projector, and {reason}")
        module.tower.problem = module.tower.problem or reason
    group, _ = dist.new_subgroups(size, timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup)
    module.ranks = SequenceRanks(group, size, dist.get_rank(group))
    difference = _difference(module, module.ranks, device)
    if not difference < (1e-3 if module.model.dtype == torch.float32 else 0.05):
        raise ValueError(
            f"{name}: hidden states of a slice of the tokens differ from those of all by {difference:.2g}, as other "
            "layers than attention mix tokens: set trainer.sequence_parallel: 1"
        )


def layout_of(cu_seqlens: np.ndarray, device: torch.device, ranks: SequenceRanks | None) -> PackedLayout:
    """cu_seqlens: int [S + 1], boundaries of the packed sequences."""
    return PackedLayout(cu_seqlens, device) if ranks is None else SplitLayout(cu_seqlens, device, ranks)


class SplitLayout(PackedLayout):
    """Of tokens that ranks share. Filler, a sequence of its own, makes N a multiple of P."""

    def __init__(self, cu_seqlens: np.ndarray, device: torch.device, ranks: SequenceRanks) -> None:
        num_tokens = int(cu_seqlens[-1])
        self.ranks = ranks
        self.share = -(-num_tokens // ranks.size)
        self.filler = self.share * ranks.size - num_tokens
        self.first = ranks.index * self.share
        super().__init__(np.append(cu_seqlens, self.share * ranks.size) if self.filler else cu_seqlens, device)

    def own(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.pad(tokens, (0, self.filler))[self.first : self.first + self.share]

    def held(self, positions: torch.Tensor) -> torch.Tensor:
        return (positions >= self.first) & (positions < self.first + self.share)

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        return _Summed.apply(values, self.ranks.group)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
        *,
        sinks: torch.Tensor | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """query [N/P, H, D], key [N/P, K, D], value [N/P, K, E] -> [N/P, H, E].

        Raises:
            ValueError: H or K do not divide.
        """
        size, heads, key_value_heads = self.ranks.size, query.shape[1], key.shape[1]
        if problem := heads_problem(heads, key_value_heads, size):
            raise ValueError(problem)
        # Of fewer key-value heads than ranks, several ranks take the same one.
        copies = max(1, size // key_value_heads)
        key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
        shares = [x.reshape(self.share, size, -1) for x in (query, key, value)]
        exchanged = self._exchange(torch.cat(shares, dim=2).transpose(0, 1)).flatten(0, 1)
        parts = exchanged.split([x.shape[2] for x in shares], dim=1)
        q, k, v = (part.unflatten(1, (-1, x.shape[2])) for part, x in zip(parts, (query, key, value), strict=True))
        own_sinks = None if sinks is None else sinks.view(size, -1)[self.ranks.index]
        out = super().attend(q, k, v, scaling, window, sinks=own_sinks, softcap=softcap)
        back = self._exchange(out.reshape(size, self.share, -1))
        return back.transpose(0, 1).reshape(self.share, heads, -1)

    def _exchange(self, shares: torch.Tensor) -> torch.Tensor:
        """[P, ...], a share for each rank -> [P, ...], one from each rank."""
        return _Exchanged.apply(shares.contiguous(), self.ranks.group)


class _Exchanged(torch.autograd.Function):
    """All-to-all: piece i goes to rank i, and its gradient comes back."""

    @staticmethod
    def forward(ctx: Any, pieces: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _all_to_all(pieces, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_to_all(grads[0].contiguous(), ctx.group), None


class _Summed(torch.autograd.Function):
    """Sum over ranks that all compute the same of it: each then has the whole gradient of its own summand."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def _all_to_all(pieces: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    received = torch.empty_like(pieces)
    dist.all_to_all_single(received, pieces, group=group)
    return received


@torch.no_grad()
def _difference(module: SplitModule, ranks: SequenceRanks, device: torch.device) -> float:
    """Between hidden states of a few tokens, split and whole: the median of this rank's, over the mean size of all."""
    lengths = (3, 4 * ranks.size - 2)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    tokens = torch.arange(sum(lengths), device=device) * 7 % module.model.config.get_text_config().vocab_size
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    layout = SplitLayout(bounds, device, ranks)
    own = module.hidden_states(tokens, positions, layout).float()
    whole = module.hidden_states(tokens, positions, PackedLayout(bounds, device)).float()
    expected = whole[layout.first : layout.first + layout.share]
    differences = (own[: len(expected)] - expected).norm(dim=1) / whole.norm(dim=1).mean()
    # A mixture of experts in 16 bits may route single tokens otherwise.
    return float(differences.median())
