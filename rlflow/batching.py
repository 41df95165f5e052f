"""Samples -> packed micro-batches by token budget, balanced over ranks, and per-token results back to their samples.

Packing is a pure function of the lengths and their order: the same samples give the same micro-batches.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise

import numpy as np

from rlflow.types import MicroBatch, Sample

_ALWAYS = ("token_ids", "loss_mask", "loss_weights")
_OPTIONAL = tuple(
    f.name
    for f in fields(MicroBatch)
    if f.default is None  # the per-token fields that only some algorithms have
)


def pack(samples: Sequence[Sample], *, max_tokens: int, num_ranks: int, unit_size: int = 1) -> list[list[MicroBatch]]:
    """Packs samples into micro-batches of at most ``max_tokens`` tokens, the same number for every rank.

    Args:
        samples: In batch order. All of them carry the same optional fields.
        max_tokens: Bound of a micro-batch. A unit longer than this gets a micro-batch of its own.
        num_ranks: Data-parallel ranks.
        unit_size: How many consecutive samples must stay together, in order (2 for preference pairs).

    Returns:
        ``[rank][micro-batch]``. A rank without work gets filler of two tokens and no loss, so that collective
        operations stay in step.
    """
    if len(samples) % unit_size:
        raise ValueError(f"{len(samples)} samples do not divide into units of {unit_size}")
    lengths = np.array([len(sample.token_ids) for sample in samples], dtype=np.int64).reshape(-1, unit_size).sum(axis=1)
    bins = _balanced_bins(lengths, max_tokens, num_ranks)
    packed = [_pack_one(samples, [u * unit_size + i for u in units for i in range(unit_size)]) for units in bins]
    return [packed[rank::num_ranks] for rank in range(num_ranks)]


def unpack(samples: Sequence[Sample], batches: Sequence[MicroBatch], values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Takes per-token results of micro-batches (each float32 [N]) back to their samples (each float32 [T])."""
    result: list[np.ndarray | None] = [None] * len(samples)
    for batch, packed in zip(batches, values, strict=True):
        for index, (start, end) in zip(batch.sample_indices, pairwise(batch.cu_seqlens), strict=True):
            if index >= 0:
                result[index] = packed[start:end]
    missing = [i for i, value in enumerate(result) if value is None]
    assert not missing, f"no result for samples {missing[:5]}"
    return [value for value in result if value is not None]


def num_real_tokens(batches: Sequence[Sequence[MicroBatch]]) -> int:
    """Tokens of all ranks' micro-batches, filler left out."""
    return sum(
        int(end - start)
        for rank in batches
        for batch in rank
        for index, (start, end) in zip(batch.sample_indices, pairwise(batch.cu_seqlens), strict=True)
        if index >= 0
    )


def _balanced_bins(lengths: np.ndarray, max_tokens: int, num_ranks: int) -> list[list[int]]:
    """Longest first into the least loaded bin, with the fewest bins (a multiple of the ranks) that all fit.

    Returns bins in an order that gives rank r the bins r, r + num_ranks, ...; units within a bin keep batch order.
    """
    order = np.argsort(-lengths, kind="stable")
    by_volume = -(-int(np.minimum(lengths, max_tokens).sum()) // max_tokens)
    no_two_fit = int((2 * lengths > max_tokens).sum())
    num_bins = num_ranks * max(1, -(-max(by_volume, no_two_fit) // num_ranks))
    while True:
        heap = [(0, b) for b in range(num_bins)]
        bins: list[list[int]] = [[] for _ in range(num_bins)]
        fits = True
        for unit in order:
            load, b = heapq.heappop(heap)
            load += int(lengths[unit])
            # Only a unit that is alone may pass the bound.
            if load > max_tokens and bins[b]:
                fits = False
                break
            bins[b].append(int(unit))
            heapq.heappush(heap, (load, b))
        if fits:
            break
        num_bins = num_ranks * -(-max(num_bins + 1, int(1.02 * num_bins)) // num_ranks)
    return [sorted(units) for units in bins]


def _pack_one(samples: Sequence[Sample], indices: list[int]) -> MicroBatch:
    if not indices:
        return _filler(samples)
    chosen = [samples[i] for i in indices]
    lengths = [len(sample.token_ids) for sample in chosen]
    per_token = {
        name: np.concatenate([getattr(sample, name) for sample in chosen])
        for name in _ALWAYS + _OPTIONAL
        if getattr(chosen[0], name) is not None
    }
    return MicroBatch(
        position_ids=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        sample_indices=np.array(indices, dtype=np.int32),
        labels=np.array([sample.label for sample in chosen], dtype=np.float32),
        margins=np.array([sample.margin for sample in chosen], dtype=np.float32),
        **per_token,
    )


def _filler(samples: Sequence[Sample]) -> MicroBatch:
    zeros = np.zeros(2, dtype=np.float32)
    present = {name: zeros for name in _OPTIONAL if samples and getattr(samples[0], name) is not None}
    return MicroBatch(
        token_ids=np.zeros(2, dtype=np.int32),
        position_ids=np.arange(2, dtype=np.int32),
        cu_seqlens=np.array([0, 2], dtype=np.int32),
        loss_mask=np.zeros(2, dtype=bool),
        loss_weights=zeros,
        sample_indices=np.array([-1], dtype=np.int32),
        labels=np.zeros(1, dtype=np.float32),
        margins=np.zeros(1, dtype=np.float32),
        **present,
    )
