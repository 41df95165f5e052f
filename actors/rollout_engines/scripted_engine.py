"""An engine without a model, for tests and for measuring what is around it: tokens by script, time by sleeping."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlflow.actors.rollout_engines.engine import CacheAtUpdate, Written
from rlflow.types import Completion, FinishReason, SampleRequest


def uniform_length(request: SampleRequest) -> int:
    """Anything from one token to the longest, by the seed."""
    return 1 + request.seed % request.params.max_new_tokens


@dataclass(slots=True)
class _Row:
    request: SampleRequest
    length: int
    versions: list[int] = field(default_factory=list)


class ScriptedEngine:
    """Writes ``length(request)`` tokens, all of them ``token``, with the logprob -1; the last one is the first stop
    token of the request where it has one and the length is below its limit."""

    def __init__(
        self,
        max_num_seqs: int,
        *,
        length: Callable[[SampleRequest], int] = uniform_length,
        token: int = 0,
        tokens_per_step: int = 1,
        step_s: float = 0.0,
        load_s: float = 0.0,
    ) -> None:
        """
        Args:
            tokens_per_step: Tokens that a step writes of every completion under way.
            step_s: Seconds that a step sleeps.
            load_s: Seconds that new weights take.
        """
        self.max_num_seqs, self.length, self.token, self.tokens_per_step = max_num_seqs, length, token, tokens_per_step
        self.step_s, self.load_s = step_s, load_s
        self.version = -1
        self._due = float("inf")
        """When the step that follows others at once has ended: a sleep that took too long makes the next one shorter.
        Infinite where none has."""
        self._waiting: list[_Row] = []
        self._running: list[_Row] = []

    def load_weights(self, weights: Iterable[tuple[str, Any]], version: int, cache: CacheAtUpdate = "recompute") -> int:
        for _ in weights:
            pass
        if self.load_s:
            time.sleep(self.load_s)
        self.version = version
        return sum(len(row.request.token_ids) + len(row.versions) for row in self._running if cache == "recompute")

    def leave_out(self, ids: np.ndarray) -> None:
        pass

    def add(self, requests: Sequence[SampleRequest]) -> None:
        assert self.version >= 0, "a request before the first weights"
        self._waiting += [_Row(request, self.length(request)) for request in requests]

    def step(self) -> list[Completion]:
        room = self.max_num_seqs - len(self._running)
        self._running += self._waiting[:room]
        del self._waiting[:room]
        if self.step_s and self._running:
            now = time.monotonic()
            begins = now if self._due == float("inf") else max(self._due, now - 10 * self.step_s)
            self._due = begins + self.step_s
            time.sleep(max(0.0, self._due - now))
        for row in self._running:
            row.versions += [self.version] * min(self.tokens_per_step, row.length - len(row.versions))
        ended = [row for row in self._running if len(row.versions) == row.length]
        self._running = [row for row in self._running if len(row.versions) < row.length]
        if not self._running and not self._waiting:
            self._due = float("inf")
        return [self._completion(row) for row in ended]

    def written(self, seen: Mapping[int, int]) -> dict[int, Written]:
        sizes = {row.request.id: len(row.versions) for row in self._running}
        newer = {id: sizes[id] - start for id, start in seen.items() if id in sizes}
        return {id: Written([self.token] * size, [-1.0] * size) for id, size in newer.items() if size > 0}

    def abort(self, ids: Sequence[int]) -> list[Completion]:
        gone = set(ids)
        rows = [row for row in [*self._running, *self._waiting] if row.request.id in gone]
        self._running = [row for row in self._running if row.request.id not in gone]
        self._waiting = [row for row in self._waiting if row.request.id not in gone]
        return [self._completion(row, "abort") for row in rows]

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _completion(self, row: _Row, reason: FinishReason | None = None) -> Completion:
        size, params = len(row.versions), row.request.params
        token_ids = np.full(size, self.token, dtype=np.int32)
        stopped = bool(params.stop_token_ids) and size < params.max_new_tokens
        if stopped and reason is None:
            token_ids[-1] = params.stop_token_ids[0]
        return Completion(
            id=row.request.id,
            token_ids=token_ids,
            logprobs=np.full(size, -1.0, dtype=np.float32),
            versions=np.array(row.versions, dtype=np.int32),
            finish_reason=reason or ("stop" if stopped else "length"),
        )
