"""The thread that steps engines while there is work, and tells whoever asked of every token between two steps.

    submit, cancel --> [ between two steps ] --> engine.step, engine.written --> tell(Piece), a call a request and step
    read           -->                       --> a future

Several engines, of adapters that share a base model, take turns: one step each.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from rlflow.actors.rollout_engines.engine import RolloutEngine, Written
from rlflow.types import Completion, SampleRequest, SamplingParams

if TYPE_CHECKING:
    from rlflow.actors.rollout_engines.prompt_logprobs import PromptLogprobs

NOTHING = Written((), ())
Reader = Callable[[np.ndarray, int], "PromptLogprobs"]
"""What an engine's model gives the tokens int [L] of a text, and the k most probable ones."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of an answer."""

    written: Written
    finish_reason: Literal["stop", "length", "error"] | None = None
    """Why it has ended, where it has."""
    error: str = ""
    """Why it failed."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One completion that somebody wants."""

    model: str
    """Whose engine."""
    token_ids: np.ndarray
    """int32 [P]."""
    seed: int
    """Unsigned, 63 bits."""
    params: SamplingParams
    tell: Callable[[Piece], None]
    """Called in the engines' thread with every piece; it must return at once."""
    images: tuple[bytes, ...] = ()
    """The pictures in ``token_ids``, encoded."""
    engine_token_ids: np.ndarray | None = None
    """int32: ``token_ids`` with one placeholder a picture; None without pictures."""

    def request(self, id_: int) -> SampleRequest:
        """As an engine takes it, under a number of its own."""
        return SampleRequest(id_, self.token_ids, self.seed, self.params, self.images, self.engine_token_ids)


@dataclass(slots=True)
class _UnderWay:
    """What one engine has to do."""

    asks: dict[int, Ask] = field(default_factory=dict)
    seen: dict[int, int] = field(default_factory=dict)
    """Request -> how many of its tokens were told."""


class Streams:
    def __init__(
        self,
        engines: Mapping[str, RolloutEngine],
        use: Callable[[str], None] = lambda name: None,
        prepare: Callable[[], None] = lambda: None,
        readers: Mapping[str, Reader] | None = None,
    ) -> None:
        """
        Args:
            engines: By the names of the models.
            use: Called before a step of an engine, where several share a model.
            prepare: Called first in the thread, for what is set for each thread alone.
            readers: By the names of the models that can be asked about texts.
        """
        self.failure: BaseException | None = None
        """Why nothing is generated any more."""
        self._engines, self._use, self._readers = dict(engines), use, dict(readers or {})
        self._under_way = {name: _UnderWay() for name in engines}
        self._changed = threading.Condition()
        self._added: list[tuple[int, Ask]] = []
        self._cancelled: list[int] = []
        self._beginning: list[tuple[int, Ask]] = []
        """Those that the thread is handing to an engine."""
        self._to_read: list[tuple[str, np.ndarray, int, Future[PromptLogprobs]]] = []
        self._ids = itertools.count()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, args=(prepare,), name="engines", daemon=True)
        self._thread.start()

    def submit(self, asks: Sequence[Ask]) -> list[int]:
        """Takes requests, to be begun in this order. Returns an id of each, for ``cancel``.

        Raises:
            RuntimeError: Nothing is generated any more.
        """
        with self._changed:
            self._require_running()
            numbered = [(next(self._ids), ask) for ask in asks]
            self._added += numbered
            self._changed.notify_all()
        return [id_ for id_, _ in numbered]

    def read(self, model: str, token_ids: np.ndarray, k: int) -> Future[PromptLogprobs]:
        """What a model gives the tokens int [L] of a text, and the k most probable ones, between two steps.

        Raises:
            RuntimeError: Nothing is read any more.
            ValueError: The model's engine cannot say.
        """
        if model not in self._readers:
            raise ValueError(f"the engine of {model} has no logprobs of prompts")
        future: Future[PromptLogprobs] = Future()
        with self._changed:
            self._require_running()
            self._to_read.append((model, token_ids, k, future))
            self._changed.notify_all()
        return future

    def cancel(self, ids: Sequence[int]) -> None:
        """Ends requests after the step under way, and tells nobody; those that have ended are left out."""
        with self._changed:
            self._cancelled += ids
            self._changed.notify_all()

    @property
    def num_under_way(self) -> int:
        """Requests that have not ended, as far as the thread knows."""
        return sum(len(one.asks) for one in self._under_way.values())

    def close(self, timeout_s: float = 30.0) -> None:
        """Ends the thread after the step under way, and then the engines; neither where that step hangs."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            for engine in self._engines.values():
                engine.close()

    def _require_running(self) -> None:
        if self.failure is not None or self._is_closed:
            raise RuntimeError(f"the engine has stopped: {self.failure or 'it was closed'}") from self.failure

    def _run(self, prepare: Callable[[], None]) -> None:
        try:
            prepare()
            while True:
                with self._changed:
                    self._changed.wait_for(self._has_work)
                    self._beginning, self._added = self._added, []
                    cancelled, self._cancelled = self._cancelled, []
                    if self._is_closed:
                        break
                self._read_one()
                self._begin()
                self._end(cancelled)
                for name, one in self._under_way.items():
                    if one.asks:
                        self._use(name)
                        self._tell(one, self._engines[name].step(), self._engines[name].written(one.seen))
            self._fail("the server is stopping")
        # Whatever fails in an engine is what everybody who waits for it, and every later call, is told.
        except BaseException as error:
            with self._changed:
                self.failure = error
            self._fail(f"{type(error).__name__}: {error}")

    def _has_work(self) -> bool:
        return bool(self._added or self._cancelled or self._to_read or self.num_under_way or self._is_closed)

    def _read_one(self) -> None:
        """One text, so that many of them do not keep what is being written waiting."""
        if self._to_read:
            model, token_ids, k, future = self._to_read[0]
            if future.set_running_or_notify_cancel():
                self._use(model)
                future.set_result(self._readers[model](token_ids, k))
            del self._to_read[0]

    def _begin(self) -> None:
        while self._beginning:
            id_, ask = self._beginning[0]
            try:
                self._engines[ask.model].add([ask.request(id_)])
            except ValueError as error:
                ask.tell(Piece(NOTHING, "error", str(error)))
            else:
                self._under_way[ask.model].asks[id_] = ask
                self._under_way[ask.model].seen[id_] = 0
            del self._beginning[0]

    def _end(self, cancelled: Sequence[int]) -> None:
        for name, one in self._under_way.items():
            ids = [id_ for id_ in cancelled if one.asks.pop(id_, None) is not None]
            for id_ in ids:
                del one.seen[id_]
            if ids:
                self._engines[name].abort(ids)

    def _tell(self, one: _UnderWay, finished: Sequence[Completion], written: Mapping[int, Written]) -> None:
        for completion in finished:
            ask, start = one.asks.pop(completion.id), one.seen.pop(completion.id)
            rest = Written(completion.token_ids[start:].tolist(), completion.logprobs[start:].tolist())
            assert completion.finish_reason != "abort", "an engine aborts what it was told to abort alone"
            ask.tell(Piece(rest, completion.finish_reason))
        for id_, new in written.items():
            one.seen[id_] += len(new.token_ids)
            one.asks[id_].tell(Piece(new))

    def _fail(self, reason: str) -> None:
        for *_, future in self._to_read:
            if future.running() or future.set_running_or_notify_cancel():
                future.set_exception(RuntimeError(reason))
        waiting = [ask for _, ask in [*self._beginning, *self._added]]
        for ask in [*waiting, *(ask for one in self._under_way.values() for ask in one.asks.values())]:
            ask.tell(Piece(NOTHING, "error", reason))
