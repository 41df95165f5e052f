"""The ranks that hold one model: samples are packed and dealt to them, and what they say comes back once.

samples --pack--> each rank's micro-batches --deal--> every rank --> results --once--> back in samples' order
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from rlflow.actors.actor_group import ActorGroup, Pending
from rlflow.batching import RankBatch, pack, unpack
from rlflow.types import Sample

T = TypeVar("T")
R = TypeVar("R")


class Started(Generic[R]):
    """A call on every rank, under way."""

    def __init__(self, pending: Pending[R], batches: Sequence[RankBatch], timeout_s: float) -> None:
        self._pending, self._batches, self._timeout_s = pending, batches, timeout_s

    @property
    def num_tokens(self) -> int:
        """Of all samples: filler does not count, and what several ranks were given counts once."""
        return sum(batch.num_real_tokens for batch in self._batches)

    def get(self) -> Sequence[R]:
        """Waits for every rank. Of ranks that share micro-batches, and so have the same results, it returns one's."""
        per_rank = self._pending.get(self._timeout_s)
        return per_rank[:: len(per_rank) // len(self._batches)]


class ModelRanks(Generic[T]):
    """One model's ranks, as the learner calls them."""

    def __init__(
        self, actors: ActorGroup[T], *, max_tokens: int, unit_size: int = 1, share: int = 1, attention_cost: float = 0.0
    ) -> None:
        """
        Args:
            max_tokens: Of a micro-batch.
            unit_size: Consecutive samples that an objective must see together: 2 for pairs.
            share: Neighbouring ranks that share each sequence's tokens, and so every micro-batch.
            attention_cost: See `rlflow.batching.pack`.
        """
        self.actors, self._max_tokens, self._unit_size = actors, max_tokens, unit_size
        self._share, self._attention_cost = share, attention_cost

    def start(self, method: Callable[..., R], samples: Sequence[Sample], *args: Any) -> Started[R]:
        """Calls ``method(micro_batches, *args)`` on every rank, with its part of the samples. Waits for nothing."""
        return self._start(method, samples, self._unit_size, args)

    def per_token(self, method: Callable[..., np.ndarray], samples: Sequence[Sample], *args: Any) -> list[np.ndarray]:
        """One number a token from a forward pass: float32 [T] of each sample, in their order."""
        started = self._start(method, samples, 1, args)
        return unpack(samples, started._batches, started.get())

    def per_sequence(
        self, method: Callable[..., np.ndarray], samples: Sequence[Sample], *args: Any
    ) -> list[np.ndarray]:
        """What a forward pass says of each sample as a whole, in their order: float32, a number or [D].

        Args:
            method: Of the ranks: the micro-batches' sequences end to end, [S] or [S, D].
        """
        started = self._start(method, samples, 1, args)
        said: list[Any] = [None] * len(samples)
        for batch, of_rank in zip(started._batches, started.get(), strict=True):
            for index, value in zip(batch.packed.sample_indices.tolist(), of_rank, strict=True):
                if index >= 0:
                    said[index] = value
        return said

    def _start(
        self, method: Callable[..., R], samples: Sequence[Sample], unit_size: int, args: tuple[Any, ...]
    ) -> Started[R]:
        batches = pack(
            samples,
            max_tokens=self._max_tokens,
            num_ranks=len(self.actors) // self._share,
            unit_size=unit_size,
            attention_cost=self._attention_cost,
        )
        dealt = [of_rank for of_rank in batches for _ in range(self._share)]
        return Started(self.actors.start_each(method, dealt, *args), batches, self.actors.timeout_s)
