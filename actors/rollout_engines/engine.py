"""What every rollout engine does: it takes requests at any time and generates for all of them, a step at a time.

One thread owns an engine and makes every call. Between two calls of `step` nothing runs, so that requests may come and
go and weights may change there; a completion under way goes on, and says of each token which version sampled it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np

from rlflow.types import Completion, SampleRequest

if TYPE_CHECKING:
    import torch

CacheAtUpdate = Literal["recompute", "keep"]
"""What becomes of the keys and values of completions that are under way when weights change: computed again with the
new weights, so that the next logprobs are exactly theirs, or kept, which costs nothing and mixes two versions."""


class WeightsLost(ConnectionError):
    """New weights have stopped coming: an engine may have some of them, and writes nothing before it has all of some
    version."""


class Written(NamedTuple):
    """Tokens of a completion that is under way, [N], and the logprobs that they were drawn with, [N]."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]


class RolloutEngine(Protocol):
    """Torch, vLLM, a server over HTTP, or a script."""

    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], version: int, cache: CacheAtUpdate = "recompute"
    ) -> int:
        """Takes new weights: tokens from the next step on are of ``version``.

        Args:
            weights: Whole tensors under a checkpoint's names; `sent_weights.Chunks` where they come in pieces.

        Returns:
            How many tokens of completions under way are read again.

        Raises:
            ValueError: A name or shape that the model does not have, or one left out.
            WeightsLost: They stopped coming.
        """
        ...

    def leave_out(self, ids: np.ndarray) -> None:
        """Gives ``ids`` of the vocabulary no probability from now on, and those of an earlier call theirs back."""
        ...

    def add(self, requests: Sequence[SampleRequest]) -> None:
        """Takes requests; they are begun in this order, as there is room. Those of one prompt that stand next to each
        other read it once.

        Raises:
            ValueError: One cannot be generated; none of them was taken.
        """
        ...

    def step(self) -> list[Completion]:
        """Makes the next token of everything under way. Returns what has finished, in the order it was added."""
        ...

    def written(self, seen: Mapping[int, int]) -> dict[int, Written]:
        """Shows what is under way.

        Args:
            seen: Request -> how many of its tokens the caller has.

        Returns:
            Request -> the tokens that came after those; requests that have none, or are not under way, are left out.
        """
        ...

    def abort(self, ids: Sequence[int]) -> list[Completion]:
        """Ends requests that are under way or waiting. Returns what was written of them, with the finish reason
        ``abort``; ids that are not here are left out."""
        ...

    @property
    def num_running(self) -> int:
        """Completions that the next step writes on, as far as the engine knows."""
        ...

    @property
    def num_waiting(self) -> int:
        """Requests that have been added and not begun."""
        ...

    def sleep(self) -> None:
        """Gives accelerator memory back between generations. Nothing is under way."""
        ...

    def wake(self) -> None:
        """Takes it again."""
        ...

    def close(self) -> None:
        """Ends the engine."""
        ...


def generate(engine: RolloutEngine, requests: Sequence[SampleRequest]) -> list[Completion]:
    """All of them to their end, in their order: for an engine that has nothing else under way."""
    engine.add(requests)
    finished: dict[int, Completion] = {}
    while len(finished) < len(requests):
        finished |= {completion.id: completion for completion in engine.step()}
    return [finished[request.id] for request in requests]
