"""Stop strings for any engine: engines know tokens, and texts that end a completion lie across them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rlflow.actors.rollout_engines.engine import CacheAtUpdate, RolloutEngine, Written
from rlflow.data.answer_text import AnswerText
from rlflow.types import Completion, SampleRequest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast


@dataclass(slots=True)
class _Text:
    """A completion under way that a stop string may end."""

    text: AnswerText
    num_read: int = 0
    """Of its tokens."""

    def read(self, token_ids: Iterable[int]) -> bool:
        """Takes what follows. Whether a stop string is complete: with token ``num_read`` then, and what comes behind it
        is not read."""
        for token_id in token_ids:
            self.text.push([token_id])
            self.num_read += 1
            if self.text.is_stopped:
                return True
        return False


class StopStrings:
    """An engine whose requests may have stop strings.

    It reads what the engine writes after each step. A completion in whose text a stop string is complete is taken out
    of the engine and ends, as by a stop token: with the token that completed it, its logprobs and versions unchanged.
    The text is what rollouts have, special tokens included.
    """

    def __init__(self, engine: RolloutEngine, tokenizer: PreTrainedTokenizerFast) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self._under_way: dict[int, _Text | None] = {}
        """Requests, in the order in which they were added; None of those without stop strings."""

    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], version: int, cache: CacheAtUpdate = "recompute"
    ) -> int:
        return self.engine.load_weights(weights, version, cache)

    def leave_out(self, ids: np.ndarray) -> None:
        self.engine.leave_out(ids)

    def add(self, requests: Sequence[SampleRequest]) -> None:
        self.engine.add(requests)
        for request in requests:
            stop = request.params.stop
            self._under_way[request.id] = _Text(AnswerText(self.tokenizer, frozenset(), stop)) if stop else None

    def step(self) -> list[Completion]:
        """Makes the next token of everything under way. Returns what has finished, in the order it was added."""
        finished = self.engine.step()
        texts = {id: text for id, text in self._under_way.items() if text is not None}
        ended = {completion.id: completion for completion in finished}
        for id in texts.keys() & ended.keys():
            completion, text = ended[id], texts.pop(id)
            if text.read(completion.token_ids[text.num_read :].tolist()):
                ended[id] = _cut(completion, text.num_read)
        written = self.engine.written({id: text.num_read for id, text in texts.items()}) if texts else {}
        stopped = [id for id, new in written.items() if texts[id].read(new.token_ids)]
        if stopped:
            aborted = self.engine.abort(stopped)
            ended |= {completion.id: _cut(completion, texts[completion.id].num_read) for completion in aborted}
        if len(ended) == len(finished):
            in_order = [completion.id for completion in finished]
        else:
            in_order = [id for id in self._under_way if id in ended]
        for id in in_order:
            del self._under_way[id]
        return [ended[id] for id in in_order]

    def written(self, seen: Mapping[int, int]) -> dict[int, Written]:
        return self.engine.written(seen)

    def abort(self, ids: Sequence[int]) -> list[Completion]:
        for id in ids:
            self._under_way.pop(id, None)
        return self.engine.abort(ids)

    @property
    def num_running(self) -> int:
        return self.engine.num_running

    @property
    def num_waiting(self) -> int:
        return self.engine.num_waiting

    def sleep(self) -> None:
        self.engine.sleep()

    def wake(self) -> None:
        self.engine.wake()

    def close(self) -> None:
        self.engine.close()


def _cut(completion: Completion, size: int) -> Completion:
    """Its first tokens, as one that ended by itself."""
    return replace(
        completion,
        token_ids=completion.token_ids[:size],
        logprobs=completion.logprobs[:size],
        versions=completion.versions[:size],
        finish_reason="stop",
    )
