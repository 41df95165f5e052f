"""RewardPool: calls in, answers out, over child processes that are killed when they hang and replaced when they die."""

from __future__ import annotations

import itertools
import selectors
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlflow.actors.reward_process import RewardProcess
from rlflow.rewards import RewardError

START_TIMEOUT_S = 120.0
"""A child that has not loaded its functions by then is an error."""


MEMORY_CHECK_S = 0.25


@dataclass(frozen=True, slots=True)
class Call:
    """One function, called with some rows of a batch."""

    function: int
    rows: range
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a call."""

    scores: list[Any] | None
    """A number, None, or a string that says what else the function returned, for each row; None when it failed."""
    error: str
    """Why it failed, as the rest of a sentence."""
    retry: bool
    """Whether the rows may fare better one by one: not where the function does not keep to its signature."""
    seconds: float
    """Of the child's time, the start of its replacement included."""


@dataclass(slots=True)
class _Job:
    call: Call
    call_id: int
    started: float


@dataclass(slots=True)
class _Worker:
    """A child and what it is doing. ``start_seconds`` is None until it is ready."""

    process: RewardProcess
    start_seconds: float | None = None
    job: _Job | None = None


class RewardPool:
    """Not thread-safe. Every wait has a deadline."""

    def __init__(self, setup: bytes, size: int, environment: Mapping[str, str], memory_bytes: int) -> None:
        """Starts ``size`` children, which load their functions side by side; does not wait for them.

        Args:
            setup: A pickled `Setup`.
            memory_bytes: A child that holds more shared memory in a call is killed.
        """
        self._setup, self._environment, self._memory_bytes = setup, environment, memory_bytes
        self._call_ids = itertools.count(1)
        self._workers = [_Worker(RewardProcess(setup, environment)) for _ in range(size)]

    @property
    def pids(self) -> list[int]:
        """Of the children that are alive now."""
        return [worker.process.pid for worker in self._workers]

    def ready(self, timeout_s: float) -> None:
        """Waits until every child has loaded its functions.

        Raises:
            RewardError: A function cannot be loaded, or not in time.
        """
        deadline = time.monotonic() + timeout_s
        while any(worker.start_seconds is None for worker in self._workers):
            if time.monotonic() > deadline:
                raise RewardError(f"reward functions were not loaded within {timeout_s:g} s")
            self._wait(deadline)
            for worker in self._workers:
                self._advance(worker)

    def run(self, queue: deque[Call], encode: Callable[[Call], bytes]) -> Iterator[tuple[Call, Answer]]:
        """Runs the calls of a queue on whatever child is free, first come, first served.

        Args:
            queue: Calls; more may be appended, and some removed, between two answers.
            encode: A call's request as bytes, asked for when a child is free.

        Yields:
            Each call with its answer, in order of completion. A call takes at most its deadline, plus the time its
            child needs to start.

        Raises:
            RewardError: A child cannot be started any more, or the pool is closed.
        """
        if not self._workers:
            raise RewardError("the reward server is closed")
        try:
            while queue or any(worker.job for worker in self._workers):
                for worker in self._workers:
                    if worker.job is None:
                        self._advance(worker)  # one that died while idle is replaced before it is given a call
                self._assign(queue, encode)
                soon = time.monotonic() + MEMORY_CHECK_S
                self._wait(min(soon, *(self._deadline(worker) for worker in self._workers)))
                for worker in self._workers:
                    job = worker.job
                    answer = self._advance(worker)
                    if job is not None and answer is not None:
                        yield job.call, answer
        finally:
            for worker in self._workers:
                if worker.job is not None:
                    self._replace(worker)

    def close(self) -> None:
        """Kills the children and everything in their process groups."""
        for worker in self._workers:
            worker.process.kill()
        self._workers.clear()

    def _assign(self, queue: deque[Call], encode: Callable[[Call], bytes]) -> None:
        for worker in self._workers:
            if queue and worker.job is None and worker.start_seconds is not None and not worker.process.closed:
                call = queue.popleft()
                worker.job = _Job(call, next(self._call_ids), time.monotonic())
                worker.process.send(worker.job.call_id, encode(call))

    def _deadline(self, worker: _Worker) -> float:
        if worker.start_seconds is None:
            return worker.process.started + START_TIMEOUT_S
        return worker.job.started + worker.job.call.timeout_s if worker.job else float("inf")

    def _wait(self, until: float) -> None:
        """Sleeps until a child has something to say or to read, or a deadline passes."""
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                worker.process.register(selector)
            selector.select(max(0.0, until - time.monotonic()) if until != float("inf") else None)

    def _advance(self, worker: _Worker) -> Answer | None:
        """Takes what the child says; returns the answer to its call when there is one, good or bad."""
        for call_id, said in worker.process.advance():
            if call_id == 0:
                self._greet(worker, said)
            elif worker.job is not None and call_id == worker.job.call_id:
                seconds = time.monotonic() - worker.job.started
                worker.job = None
                if "scores" in said:
                    return Answer(said["scores"], "", False, seconds)
                return Answer(None, said["error"], "retry" in said, seconds)
        gone = worker.process.closed
        shared = worker.process.shared_bytes if worker.job is not None and not gone else 0
        if not gone and time.monotonic() < self._deadline(worker) and shared <= self._memory_bytes:
            return None
        job, start_seconds = worker.job, worker.start_seconds
        ending = self._replace(worker)
        if start_seconds is None:
            what = "died while loading" if gone else f"did not load its functions within {START_TIMEOUT_S:g} s"
            # Imports that get no memory may also wait for ever.
            remedy = "if it was short of memory, raise reward_server.memory_gib"
            raise RewardError(f"a reward process {what} ({ending}); {remedy}")
        if job is None:
            return None
        cause = "ended its process" if gone else f"gave no answer within {job.call.timeout_s:g} s"
        if shared > self._memory_bytes:
            cause = f"took {shared / 2**30:.2f} GiB of shared memory, more than reward_server.memory_gib"
        return Answer(None, f"{cause} ({ending})", True, time.monotonic() - job.started + start_seconds)

    def _greet(self, worker: _Worker, said: dict[str, Any]) -> None:
        if "fatal" in said:
            raise RewardError(said["fatal"])
        worker.start_seconds = time.monotonic() - worker.process.started

    def _replace(self, worker: _Worker) -> str:
        ending = worker.process.kill()
        worker.process, worker.start_seconds, worker.job = RewardProcess(self._setup, self._environment), None, None
        return ending
