"""Samples -> packed micro-batches by token budget, balanced over ranks, and per-token results back to their samples.

A rank's micro-batches lie end to end in one array a field: they cross to its actor as they are, however many there are,
and are views there.

Packing is a pure function of the lengths and their order: the same samples give the same micro-batches. Tokens bound a
micro-batch, as they take the memory; what ranks share evenly is its estimated cost, the time.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, overload

import numpy as np

from rlflow.types import MicroBatch, Sample

_NUMBERS = {
    "label": "labels",
    "group": "groups",
    "targets": "targets",
    "text": "texts",
    "reward_margin": "reward_margins",
    "rank_margin": "rank_margins",
    "rank_partner": "rank_partners",
    "batch_kl": "batch_kls",
}
"""A sample's number, or row of numbers -> the micro-batch's field; not all algorithms have all."""
_OPTIONAL = tuple(
    f.name
    for f in fields(MicroBatch)
    # The per-token fields that only some algorithms have.
    if f.default is None and f.name not in _NUMBERS.values()
)
_OF_SAMPLES = ("token_ids", "loss_mask", "loss_weights", *_OPTIONAL)
_PER_TOKEN = ("position_ids", *_OF_SAMPLES)
_PER_SEQUENCE = ("sample_indices", *_NUMBERS.values())
_DTYPES: dict[str, Any] = {"token_ids": np.int32, "loss_mask": np.bool_, "teacher_hidden": None}
"""float32 is the others'; None keeps what a field came in."""


@dataclass(frozen=True, slots=True)
class RankBatch(Sequence[MicroBatch]):
    """The micro-batches of one rank."""

    packed: MicroBatch
    """All of their sequences, as if they were one micro-batch."""
    bounds: tuple[int, ...]
    """[B + 1]: micro-batch b has the sequences ``bounds[b]`` to ``bounds[b + 1]``."""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, index: int) -> MicroBatch: ...

    @overload
    def __getitem__(self, index: slice) -> list[MicroBatch]: ...

    def __getitem__(self, index: int | slice) -> MicroBatch | list[MicroBatch]:
        """A micro-batch, whose arrays but ``cu_seqlens`` are views."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"micro-batch {index} of {len(self)}")
        index %= len(self)
        first, end = self.bounds[index], self.bounds[index + 1]
        borders = self.packed.cu_seqlens[first : end + 1]
        tokens, sequences = slice(int(borders[0]), int(borders[-1])), slice(first, end)
        parts = {**dict.fromkeys(_PER_TOKEN, tokens), **dict.fromkeys(_PER_SEQUENCE, sequences)}
        present = {name: getattr(self.packed, name) for name in parts}
        return MicroBatch(
            cu_seqlens=borders - borders[0],
            images=self.packed.images[sequences],
            **{name: values[parts[name]] for name, values in present.items() if values is not None},
        )

    @property
    def num_real_tokens(self) -> int:
        """Tokens of samples: those of filler do not count."""
        return int(np.diff(self.packed.cu_seqlens)[self.packed.sample_indices >= 0].sum())


def pack(
    samples: Sequence[Sample], *, max_tokens: int, num_ranks: int, unit_size: int = 1, attention_cost: float = 0.0
) -> list[RankBatch]:
    """Packs samples into micro-batches of at most ``max_tokens`` tokens, the same number for every rank.

    Args:
        samples: In batch order. All of them carry the same optional fields.
        max_tokens: Bound of a micro-batch. A unit longer than this gets a micro-batch of its own.
        num_ranks: Data-parallel ranks.
        unit_size: How many consecutive samples must stay together, in order (2 for preference pairs).
        attention_cost: What a token costs more for each token of its sequence, in costs of a token alone: a sequence of
            L tokens costs ``L * (1 + attention_cost * L)``.

    Returns:
        Each rank's, the costliest micro-batch first; those with the same index, which ranks work on at the same time,
        cost about the same. A rank without work gets filler of two tokens and no loss, so that collective operations
        stay in step.
    """
    if len(samples) % unit_size:
        raise ValueError(f"{len(samples)} samples do not divide into units of {unit_size}")
    in_units = np.array([len(sample.token_ids) for sample in samples], dtype=np.int64).reshape(-1, unit_size)
    lengths, costs = in_units.sum(axis=1), (in_units * (1 + attention_cost * in_units)).sum(axis=1)
    dealt = deal(lengths, costs, max_tokens, num_ranks)
    return [
        _pack_rank(samples, [[u * unit_size + i for u in units for i in range(unit_size)] for units in of_rank])
        for of_rank in dealt
    ]


def unpack(samples: Sequence[Sample], batches: Sequence[RankBatch], values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Takes results back to their samples, as views, each float32 [T].

    Args:
        values: Per-token results of each rank, float32 [N] of its micro-batches end to end.
    """
    result: list[np.ndarray | None] = [None] * len(samples)
    for batch, of_rank in zip(batches, values, strict=True):
        borders = pairwise(batch.packed.cu_seqlens.tolist())
        for index, (start, end) in zip(batch.packed.sample_indices.tolist(), borders, strict=True):
            if index >= 0:
                result[index] = of_rank[start:end]
    missing = [i for i, value in enumerate(result) if value is None]
    assert not missing, f"no result for samples {missing[:5]}"
    return [value for value in result if value is not None]


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


def _pack_rank(samples: Sequence[Sample], of_batches: Sequence[Sequence[int]]) -> RankBatch:
    """
    Args:
        of_batches: The samples of each micro-batch; one without gets filler.
    """
    filler = _filler(samples)
    indices = [index for of_one in of_batches for index in of_one or (-1,)]
    chosen = [filler if index < 0 else samples[index] for index in indices]
    lengths = np.array([len(sample.token_ids) for sample in chosen])
    cu_seqlens = np.zeros(len(chosen) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    positions = np.arange(cu_seqlens[-1], dtype=np.int32)
    positions -= np.repeat(cu_seqlens[:-1], lengths)
    present = [name for name in _OF_SAMPLES if getattr(chosen[0], name) is not None]
    packed = MicroBatch(
        position_ids=positions,
        cu_seqlens=cu_seqlens,
        sample_indices=np.array(indices, dtype=np.int32),
        images=tuple(sample.images for sample in chosen) if any(sample.images for sample in samples) else (),
        **{
            name: np.array([getattr(sample, field) for sample in chosen], dtype=np.float32)
            for field, name in _NUMBERS.items()
            if getattr(chosen[0], field) is not None
        },
        **{
            name: np.concatenate(
                [getattr(sample, name) for sample in chosen], dtype=_DTYPES.get(name, np.float32), casting="same_kind"
            )
            for name in present
        },
    )
    bounds = np.cumsum([0, *(max(1, len(of_one)) for of_one in of_batches)])
    return RankBatch(packed, tuple(bounds.tolist()))


def with_the_fields_of(sample: Sample, other: Sample) -> Sample:
    """The sample with zeros in the optional fields that another one has: those of a batch have the same."""
    zeros = np.zeros(len(sample.token_ids), dtype=np.float32)
    of_both = {**dict.fromkeys(_OPTIONAL, zeros), **dict.fromkeys(_NUMBERS, 0.0)}
    missing: dict[str, Any] = {
        name: value
        for name, value in of_both.items()
        if getattr(other, name) is not None and getattr(sample, name) is None
    }
    return replace(sample, **missing)


def _filler(samples: Sequence[Sample]) -> Sample:
    """Two tokens without a loss, with the fields that the samples have."""
    zeros = np.zeros(2, dtype=np.float32)
    present: dict[str, Any] = {}
    for name in (*_OPTIONAL, *_NUMBERS):
        value = getattr(samples[0], name) if samples else None
        if name in _NUMBERS and value is not None:
            present[name] = np.zeros_like(value) if isinstance(value, np.ndarray) else 0
        elif value is not None:
            present[name] = np.zeros((2, *value.shape[1:]), dtype=value.dtype)
    return Sample(np.zeros(2, dtype=np.int32), np.zeros(2, dtype=bool), zeros, **present)
