"""The thread that owns a worker's engine: it steps while there is work, and takes orders between two steps.

      submit, abort, load_weights, do
               |  (any thread; a future each)
               v
    orders --> [ between two steps ] --> engine.step() --> whole groups --> take_finished (any thread)
                        ^                     |
                        +---------------------+

A group that asks for newer weights than the engine has is held back until they are there. A rollout in an environment
is several completions: between two of them it has nothing in the engine, which does not wait for it.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from rlflow.actors.engine_groups import EngineCounts, EngineGroup, RunningAtUpdate, WaitingUpdate
from rlflow.actors.rollout_engines.engine import CacheAtUpdate, RolloutEngine, WeightsLost
from rlflow.tracking.spans import WAIT
from rlflow.types import Completion, GroupRequest, SampleRequest

if TYPE_CHECKING:
    import torch

    from rlflow.actors.environment_episodes import Episodes, PlayedEpisode

T = TypeVar("T")


class EngineThread:
    def __init__(self, engine: RolloutEngine, max_num_seqs: int, prepare: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            max_num_seqs: How many completions the engine generates at a time.
            prepare: Called first in the thread, for what is set for each thread alone.
        """
        self.engine, self.max_num_seqs = engine, max_num_seqs
        self.version = -1
        """Of the engine's weights; -1 before the first."""
        self.episodes: Episodes | None = None
        """The turn loop of rollouts in an environment."""
        self.counts = EngineCounts()
        self._changed = threading.Condition()
        self._orders: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._held: list[GroupRequest] = []
        """Groups that wait for weights."""
        self._groups: dict[int, EngineGroup] = {}
        self._place_of: dict[int, tuple[int, int]] = {}
        """Sample -> its group, and its index there."""
        self._away: set[int] = set()
        """Samples whose environment speaks: they have nothing in the engine."""
        self._sample_ids = itertools.count()
        self._finished: deque[EngineGroup] = deque()
        self._update: WaitingUpdate | None = None
        """Weights that wait until what is under way has ended."""
        self._is_closed = self._is_hurried = False
        self._is_torn = False
        """The engine has some of the new weights and some of the old: it makes no step before it has all of some."""
        self._broken: Exception | None = None
        """Why something was done in part: with some of the new weights, what the engine writes is of no version."""
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(prepare,), name="engine", daemon=True)
        self._thread.start()

    def do(self, order: Callable[[], T]) -> Future[T]:
        """Has something done between two steps."""
        future: Future[T] = Future()
        with self._changed:
            self._require_alive()
            self._orders.append((order, future))
            self._changed.notify_all()
        return future

    def submit(self, requests: Sequence[GroupRequest]) -> Future[None]:
        """Takes groups, which are begun in this order, all of them between the same two steps."""
        return self.do(lambda: self._take(requests))

    def abort(self, group_ids: Sequence[int]) -> Future[None]:
        """Forgets groups, whatever has become of them here; ids that are not here are left out."""
        return self.do(lambda: self._forget(group_ids))

    def load_weights(
        self,
        weights: Callable[[], Iterable[tuple[str, torch.Tensor]]],
        version: int,
        running: RunningAtUpdate = "continue",
        cache: CacheAtUpdate = "recompute",
    ) -> Future[None]:
        """Gives the engine new weights between two steps; older ones than it has are left out.

        Calls that were made one after the other may come in in another order, as they run in threads of their own.
        """
        future: Future[None] = Future()

        def load() -> None:
            if running != "wait" or not self._groups:
                _settle(future, lambda: self._load(weights, version, running, cache))
                return
            futures = [future]
            if self._update is not None:
                futures += self._update.futures
            if self._update is None or self._update.version < version:
                self._update = WaitingUpdate(version, lambda: self._load(weights, version, running, cache), futures)
            else:
                self._update.futures[:] = futures

        asked = self.do(load)
        asked.add_done_callback(lambda done: done.exception() and future.set_exception(done.exception()))
        return future

    @property
    def has_room(self) -> bool:
        """Whether more could be generated at the same time."""
        return self.engine.num_running + self.engine.num_waiting + self.num_held < self.max_num_seqs

    def take_finished(self, most: int, timeout_s: float, *, wants_room: bool = False) -> list[EngineGroup]:
        """Up to ``most`` groups that are done, as soon as there is one; none when the time is up, or at `hurry`.

        Args:
            wants_room: Also return as soon as there is room for more.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._finished
                    or self._failure
                    or self._is_closed
                    or self._is_hurried
                    or (wants_room and not self._orders and self.has_room)
                ),
                timeout_s,
            )
            self._is_hurried = False
            if not self._finished:
                self._require_alive()
            return [self._finished.popleft() for _ in range(min(most, len(self._finished)))]

    def hurry(self) -> None:
        """Ends a wait for groups: the one that is under way, or the next."""
        with self._changed:
            self._is_hurried = True
            self._changed.notify_all()

    def take_spans(self) -> tuple[tuple[str, float, float], ...]:
        """What the thread has done since the last call."""
        spans, self.counts.spans = self.counts.spans, []
        return tuple(spans)

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends the thread after the step that is under way, and then the engine; neither where that step hangs."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self.engine.close()

    @property
    def num_held(self) -> int:
        """Samples that wait for weights, or for their environment: their place in the engine is kept."""
        return sum(len(request.seeds) for request in self._held) + len(self._away)

    def go_on(self, sample: SampleRequest) -> Future[None]:
        """Has the next turn of an episode written; of one that is not wanted any more, nothing happens."""
        return self.do(lambda: self._go_on(sample))

    def end_episode(self, id: int, episode: PlayedEpisode) -> Future[None]:
        """Takes an episode that is over."""
        return self.do(lambda: self._end(id, episode))

    def fail(self, error: BaseException) -> Future[None]:
        """Ends the thread for what happened elsewhere."""

        def end() -> None:
            self._broken = error if isinstance(error, Exception) else RuntimeError(repr(error))

        return self.do(end)

    def _run(self, prepare: Callable[[], None]) -> None:
        try:
            prepare()
            while True:
                with self._changed:
                    self._await_work()
                    if self._is_closed:
                        break
                    orders = list(self._orders)
                    self._orders.clear()
                for order, future in orders:
                    _settle(future, order)
                if self._broken is None and self._is_writing:
                    self._step()
                if self._update is not None and not self._groups:
                    update, self._update = self._update, None
                    first, *others = update.futures
                    _settle(first, update.load)
                    for other in others:
                        _settle(other, first.result)
                if self._broken is not None:
                    raise self._broken
            self._end_calls(RuntimeError("the engine is closed"))
        # The engine's failure is what every later call of the worker says.
        except BaseException as error:
            self._fail(error)

    def _await_work(self) -> None:
        if not (self._orders or self._is_writing or self._is_closed):
            started = time.time()
            self._changed.wait_for(lambda: self._orders or self._is_closed)
            self._note(WAIT, started, time.time())

    @property
    def _is_writing(self) -> bool:
        """Whether the engine has anything to write, and weights to write it with."""
        return len(self._place_of) > len(self._away) and not self._is_torn

    def _step(self) -> None:
        started = time.time()
        completions = self.engine.step()
        ended = time.time()
        self.counts.steps += 1
        self.counts.busy_s += ended - started
        self._note("generate", started, ended)
        for completion in completions:
            self.counts.tokens += len(completion.token_ids)
            if self._groups[self._place_of[completion.id][0]].request.limits is None:
                self._end(completion.id, completion)
            else:
                assert self.episodes is not None
                self._away.add(completion.id)
                self.episodes.wrote(completion)

    def _end(self, id: int, made: Completion | PlayedEpisode) -> None:
        """Takes a rollout that is complete; what was forgotten meanwhile is not heard."""
        if id not in self._place_of:
            return
        group_id, index = self._place_of.pop(id)
        self._away.discard(id)
        group = self._groups[group_id]
        group.completions[index] = made
        if not group.is_done:
            return
        del self._groups[group_id]
        with self._changed:
            self._finished.append(group)
            self._changed.notify_all()

    def _go_on(self, sample: SampleRequest) -> None:
        if sample.id in self._away:
            self.engine.add([sample])
            self._away.remove(sample.id)
            self.counts.replies += 1

    def _take(self, requests: Sequence[GroupRequest]) -> None:
        self._begin(requests)
        self.counts.samples += sum(len(request.seeds) for request in requests)

    def _begin(self, requests: Sequence[GroupRequest]) -> None:
        may_begin = self._update is None
        ready = [request for request in requests if may_begin and request.min_version <= self.version]
        samples: list[SampleRequest] = []
        groups = []
        for request in ready:
            ids = [next(self._sample_ids) for _ in request.seeds]
            groups.append(EngineGroup(request, [None] * len(ids), ids))
            if request.limits is not None:
                continue
            prompt = request.prompt
            of_prompt = (prompt.images, prompt.engine_token_ids)
            samples += [
                SampleRequest(id, prompt.token_ids, seed, request.params_of(index), *of_prompt)
                for index, (id, seed) in enumerate(zip(ids, request.seeds, strict=True))
            ]
        if samples:
            self.engine.add(samples)
        for group in groups:
            self._groups[group.request.id] = group
            self._place_of |= {id: (group.request.id, index) for index, id in enumerate(group.samples)}
            if group.request.limits is not None:
                assert self.episodes is not None, "an episode where there is no environment"
                self._away.update(group.samples)
                request = group.request
                for index, (id, seed) in enumerate(zip(group.samples, request.seeds, strict=True)):
                    self.episodes.begin(id, replace(request, params=request.params_of(index)), seed)
        begun = {request.id for request in ready}
        self._held += [request for request in requests if request.id not in begun]

    def _forget(self, group_ids: Sequence[int]) -> None:
        gone = set(group_ids)
        self._held = [request for request in self._held if request.id not in gone]
        with self._changed:
            kept = [group for group in self._finished if group.request.id not in gone]
            self._finished = deque(kept)
        samples = []
        for group_id in gone & self._groups.keys():
            group = self._groups.pop(group_id)
            left = group.unfinished
            if group.request.limits is not None and self.episodes is not None:
                self.episodes.forget(left)
            samples += [id for id in left if id not in self._away]
            self._away.difference_update(left)
            for id in left:
                del self._place_of[id]
        if samples:
            self._whole(lambda: self.engine.abort(sorted(samples)))

    def _whole(self, change: Callable[[], T]) -> T:
        """Does something that breaks the engine where it fails half-way."""
        try:
            return change()
        except WeightsLost:
            self._is_torn = True
            raise
        except Exception as error:
            self._broken = error
            raise

    def _load(
        self,
        weights: Callable[[], Iterable[tuple[str, torch.Tensor]]],
        version: int,
        running: RunningAtUpdate,
        cache: CacheAtUpdate,
    ) -> None:
        if version <= self.version:
            return
        started = time.time()
        again = [group.request for group in self._groups.values()] if running == "restart" else []
        self._forget([request.id for request in again])
        try:
            self.counts.reread_tokens += self._whole(lambda: self.engine.load_weights(weights(), version, cache))
        except WeightsLost:
            self._held = [*again, *self._held]
            raise
        self.version, self._is_torn = version, False
        ended = time.time()
        self.counts.loads += 1
        self.counts.load_s += ended - started
        self._note("load_weights", started, ended)
        held, self._held = self._held, []
        self._begin([*again, *held])

    def _note(self, what: str, started: float, ended: float) -> None:
        """Those of one kind that follow each other at once are one span."""
        spans = self.counts.spans
        if spans and spans[-1][0] == what and started - spans[-1][2] < 0.005:
            started = spans.pop()[1]
        spans.append((what, started, ended))

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = error
            self._changed.notify_all()
        self._end_calls(error)

    def _end_calls(self, error: BaseException) -> None:
        """Tells everybody who waits for an order that it will not be done."""
        with self._changed:
            futures = [future for _, future in self._orders]
            futures += self._update.futures if self._update is not None else []
            self._orders.clear()
        for future in futures:
            future.set_exception(error)

    def _require_alive(self) -> None:
        if self._failure is not None:
            raise RuntimeError(
                f"the engine has failed: {type(self._failure).__name__}: {self._failure}"
            ) from self._failure
        if self._is_closed:
            raise RuntimeError("the engine is closed")


def _settle(future: Future[Any], order: Callable[[], Any]) -> None:
    """Does something for somebody else, who is told how it ended."""
    try:
        future.set_result(order())
    # Whoever asked for it is told.
    except Exception as error:
        future.set_exception(error)
