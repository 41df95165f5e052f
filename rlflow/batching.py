"""Samples -> packed micro-batches by token budget, balanced over ranks, and per-token results back to their samples.

Packing is a pure function of the lengths and their order: the same samples give the same micro-batches. Tokens bound a
micro-batch, as they take the memory; what ranks share evenly is its estimated cost, the time.
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


def pack(
    samples: Sequence[Sample], *, max_tokens: int, num_ranks: int, unit_size: int = 1, attention_cost: float = 0.0
) -> list[list[MicroBatch]]:
    """Packs samples into micro-batches of at most ``max_tokens`` tokens, the same number for every rank.

    Args:
        samples: In batch order. All of them carry the same optional fields.
        max_tokens: Bound of a micro-batch. A unit longer than this gets a micro-batch of its own.
        num_ranks: Data-parallel ranks.
        unit_size: How many consecutive samples must stay together, in order (2 for preference pairs).
        attention_cost: What a token costs more for each token of its sequence, in costs of a token alone: a sequence of
            L tokens costs ``L * (1 + attention_cost * L)``.

    Returns:
        ``[rank][micro-batch]``, the costliest first; those with the same index, which ranks work on at the same time,
        cost about the same. A rank without work gets filler of two tokens and no loss, so that collective operations
        stay in step.
    """
    if len(samples) % unit_size:
        raise ValueError(f"{len(samples)} samples do not divide into units of {unit_size}")
    of_sample = np.array([len(sample.token_ids) for sample in samples], dtype=np.int64).reshape(-1, unit_size)
    lengths, costs = of_sample.sum(axis=1), (of_sample * (1 + attention_cost * of_sample)).sum(axis=1)
    dealt = deal(lengths, costs, max_tokens, num_ranks)
    return [
        [_pack_one(samples, [u * unit_size + i for u in units for i in range(unit_size)]) for units in of_rank]
        for of_rank in dealt
    ]


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


def deal(lengths: np.ndarray, costs: np.ndarray, max_tokens: int, num_ranks: int) -> list[list[list[int]]]:
    """Units -> ``[rank][micro-batch][unit]``; units within a micro-batch keep batch order.

    Args:
        lengths: int [U], tokens of a unit.
        costs: float [U], its estimated time in any measure.
    """
    bins = _fewest_bins(lengths, costs, max_tokens, num_ranks)
    of_bin = np.array([costs[units].sum() for units in bins])
    by_cost = np.argsort(-of_bin, kind="stable").reshape(-1, num_ranks)
    dealt: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    totals = np.zeros(num_ranks)
    for neighbours in by_cost:
        # The costliest goes to the rank that has the least so far.
        for rank, index in zip(np.argsort(totals, kind="stable"), neighbours, strict=True):
            dealt[rank].append(sorted(bins[index]))
            totals[rank] += of_bin[index]
    return dealt


def _fewest_bins(lengths: np.ndarray, costs: np.ndarray, max_tokens: int, num_ranks: int) -> list[list[int]]:
    """The fewest bins, a multiple of the ranks, that hold all units: of equal costs, or else of equal lengths."""
    by_volume = -(-int(np.minimum(lengths, max_tokens).sum()) // max_tokens)
    no_two_fit = int((2 * lengths > max_tokens).sum())
    num_bins = num_ranks * max(1, -(-max(by_volume, no_two_fit) // num_ranks))
    while True:
        for loads in (costs, lengths):
            if bins := _fill(lengths, loads, max_tokens, num_bins):
                return bins
        num_bins = num_ranks * -(-max(num_bins + 1, int(1.02 * num_bins)) // num_ranks)


def _fill(lengths: np.ndarray, loads: np.ndarray, max_tokens: int, num_bins: int) -> list[list[int]] | None:
    """The largest load first, into the least loaded bin; None where a unit has no room there.

    Only a unit that is alone may pass the bound.
    """
    heap: list[tuple[float, int, int]] = [(0.0, 0, b) for b in range(num_bins)]
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    order = np.argsort(-loads, kind="stable")
    for unit, length, load in zip(order.tolist(), lengths[order].tolist(), loads[order].tolist(), strict=True):
        before, tokens, b = heap[0]
        if bins[b] and tokens + length > max_tokens:
            return None
        bins[b].append(unit)
        heapq.heapreplace(heap, (before + load, tokens + length, b))
    return bins


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
