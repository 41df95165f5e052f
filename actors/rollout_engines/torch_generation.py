"""Completions under way on one model: who waits, what is written of whom, and the step that writes a token of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rlflow.actors.rollout_engines.engine import Written
from rlflow.actors.rollout_engines.torch_reading import Reader
from rlflow.actors.rollout_engines.torch_sampling import AlikeRows, sample_each
from rlflow.types import Completion, FinishReason, SampleRequest, SamplingParams

_ROOM = 16
"""While more requests wait than there is room for, at most one in so many rows is empty: to read one prompt takes
about as long as to read several."""


class Row:
    """A request that has been begun.

    It draws from a random stream of its own, a number a token, so what it becomes does not depend on the rows beside it
    (up to rounding in the forward pass).
    """

    __slots__ = ("limit", "logprobs", "order", "random", "request", "stops", "tokens", "versions")

    def __init__(self, request: SampleRequest, order: int, version: int) -> None:
        self.request, self.order = request, order
        self.stops, self.limit = request.params.stop_token_ids, request.params.max_new_tokens
        self.random = np.random.Generator(np.random.Philox(key=request.seed)).random
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.versions = [(0, version)]
        """From which token on which weights sampled."""

    @property
    def text(self) -> np.ndarray:
        """Prompt and what is written, int64 [P + C]."""
        return np.concatenate([self.request.token_ids.astype(np.int64), np.array(self.tokens, dtype=np.int64)])

    def write(self, token: int, logprob: float) -> FinishReason | None:
        """Why the row ends with this token, if it does."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self.stops:
            return "stop"
        return "length" if len(self.tokens) == self.limit else None

    def completion(self, reason: FinishReason) -> Completion:
        starts, versions = zip(*self.versions, strict=True)
        return Completion(
            id=self.request.id,
            token_ids=np.array(self.tokens, dtype=np.int32),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            versions=np.repeat(np.array(versions, dtype=np.int32), np.diff([*starts, len(self.tokens)])),
            finish_reason=reason,
        )


class Generation:
    def __init__(self, model: Any, reader: Reader, max_num_seqs: int, version: int) -> None:
        self.model, self.reader, self.max_num_seqs = model, reader, max_num_seqs
        self.version = version
        """Of the model's weights."""
        self.reading = reader(model)
        self.waiting: deque[SampleRequest] = deque()
        self.rows: list[Row] = []
        """In the order of the reading."""
        self.num_begun = 0
        self.groups: list[AlikeRows] | None = None
        """Rows by their parameters; None where they have changed."""

    @property
    def ids(self) -> set[int]:
        """Of everything that waits or is under way."""
        return {request.id for request in (*self.waiting, *(row.request for row in self.rows))}

    def step(self, left_out: torch.Tensor | None) -> list[Completion]:
        """Writes a token of each row.

        Args:
            left_out: Ids without probability, int [K].
        """
        self._admit()
        if not self.rows:
            return []
        logits = self.reading.logits()
        if left_out is not None:
            logits = logits.index_fill(-1, left_out, -torch.inf)
        if self.groups is None:
            self.groups = self._group(logits)
        uniforms = torch.tensor([row.random() for row in self.rows], dtype=torch.float64)
        tokens, logprobs = sample_each(logits, uniforms.to(logits.device, non_blocking=True), self.groups)
        self.reading.write(tokens)
        for group in self.groups:
            if group.seen is not None:
                group.seen.scatter_(1, tokens[group.rows][:, None], True)
        # The one place of a step where the host waits for the device.
        tokens_then_logprobs = torch.stack([tokens.double(), logprobs.double()]).tolist()
        ended: dict[int, FinishReason] = {}
        for index, (row, token, logprob) in enumerate(zip(self.rows, *tokens_then_logprobs, strict=True)):
            reason = row.write(int(token), logprob)
            if reason is not None:
                ended[index] = reason
        return self._end(ended)

    def written(self, seen: Mapping[int, int]) -> dict[int, Written]:
        """What each row has beyond so many tokens, by its request."""
        newer = ((row, seen[row.request.id]) for row in self.rows if row.request.id in seen)
        return {
            row.request.id: Written(row.tokens[start:], row.logprobs[start:])
            for row, start in newer
            if len(row.tokens) > start
        }

    def abort(self, ids: Iterable[int]) -> list[Completion]:
        """Ends requests. Returns what was written of them, in the order of ``ids``."""
        wanted = dict.fromkeys(ids)
        ended = self._end({i: "abort" for i, row in enumerate(self.rows) if row.request.id in wanted})
        unbegun = [Row(request, 0, self.version) for request in self.waiting if request.id in wanted]
        self.waiting = deque(request for request in self.waiting if request.id not in wanted)
        completions = {completion.id: completion for completion in ended}
        completions |= {row.request.id: row.completion("abort") for row in unbegun}
        return [completions[id] for id in wanted if id in completions]

    def change_version(self, version: int) -> None:
        """Tokens from now on are of these weights, with which nothing has been read yet."""
        self.version = version
        for row in self.rows:
            row.versions.append((len(row.tokens), version))
        self.reading.outdate()

    def read_again(self, reader: Reader) -> int:
        """Reads all that is written once more. Returns how many tokens."""
        self.reader, self.reading = reader, reader(self.model)
        texts = [row.text for row in self.rows]
        if texts:
            self.reading.add(texts, [row.request.images for row in self.rows])
        return sum(len(text) - 1 for text in texts)

    def _admit(self) -> None:
        room, num_waiting = self.max_num_seqs - len(self.rows), len(self.waiting)
        if min(room, num_waiting) == 0 or room < min(num_waiting, self.max_num_seqs // _ROOM):
            return
        requests = [self.waiting.popleft() for _ in range(min(room, num_waiting))]
        self.rows += [Row(request, self.num_begun + i, self.version) for i, request in enumerate(requests)]
        self.num_begun += len(requests)
        self.groups = None
        self.reading.add([request.token_ids for request in requests], [request.images for request in requests])

    def _end(self, ended: dict[int, FinishReason]) -> list[Completion]:
        """Takes rows out."""
        if not ended:
            return []
        in_order = sorted(ended, key=lambda index: self.rows[index].order)
        completions = [self.rows[index].completion(ended[index]) for index in in_order]
        left = self.reading.remove(np.array(sorted(ended)))
        self.rows = [self.rows[index] for index in left.tolist()]
        self.groups = None
        return completions

    def _group(self, logits: torch.Tensor) -> list[AlikeRows]:
        members: dict[SamplingParams, list[int]] = {}
        for index, row in enumerate(self.rows):
            members.setdefault(row.request.params, []).append(index)
        return [
            AlikeRows(
                params,
                torch.tensor(rows, device=logits.device),
                self._seen(rows, logits) if params.repetition_penalty != 1 else None,
            )
            for params, rows in members.items()
        ]

    def _seen(self, rows: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """bool [K, V]: tokens that each of these rows has."""
        seen = torch.zeros(len(rows), logits.shape[-1], dtype=torch.bool)
        for own, row in zip(seen, rows, strict=True):
            own[torch.from_numpy(self.rows[row].text)] = True
        return seen.to(logits.device)
