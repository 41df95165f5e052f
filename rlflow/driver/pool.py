"""RolloutPool: groups are asked for, workers generate them, servers score them; workers may be slow, stop or die.

    ask --> queued --lease--> running on a worker --collect--> generated --score--> delivered
              ^                     |
              +--- lost worker -----+

A thread of the driver waits for what workers and servers say; the driver's own thread asks, and publishes weights.
Both change the pool's state under one lock, which ``deliver`` is called with.

Who gives back a group first is believed; what a worker says that has been replaced, or of a group that another has
given back meanwhile, is refused. A worker that is lost is started again and gets the newest weights, and its groups are
asked for again with the same seeds.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from rlflow.actors.actor_group import ActorFailure, ActorGroup, Span
from rlflow.actors.completion_texts import decode_completions
from rlflow.actors.rollout_worker import Collected, RolloutWorker
from rlflow.driver.assemble import unscored_group
from rlflow.driver.errors import RunError
from rlflow.driver.leases import Member, metrics_of
from rlflow.driver.scoring import Deliver, Scoring
from rlflow.driver.weight_supply import WeightSupply
from rlflow.recipe import RolloutBlock
from rlflow.rollout_checks import arrival_problem
from rlflow.types import GroupRequest, RolloutBatch

POLL_S = 0.5
"""A worker with nothing to give back says so after this time."""
COLLECT_MOST = 16
"""Groups that a worker gives back in one answer."""


class RolloutPool:
    def __init__(
        self,
        workers: ActorGroup[RolloutWorker],
        scoring: Scoring,
        rollout: RolloutBlock,
        *,
        tokenizer: Any,
        is_token: np.ndarray,
        startup_timeout_s: float,
        tell: Callable[[str], None] = lambda message: None,
        span: Span = lambda actor, name, began, ended: None,
    ) -> None:
        """
        Args:
            workers: They have said that they are ready.
            is_token: bool [V]: ids that stand for a token.
            tell: Called with what users should know, e.g. that a worker was started again.
            span: Called with what each worker did, and when.
        """
        self.workers, self.scoring, self.rollout = workers, scoring, rollout
        self.tokenizer, self.is_token, self.tell, self.span = tokenizer, is_token, tell, span
        self.startup_timeout_s = startup_timeout_s
        self.lock = threading.Condition(threading.RLock())
        self.members = {rank: Member(rank, is_up=True) for rank in workers.ranks}
        self.refused = 0
        """Groups that came from a worker that had been replaced, or a second time."""
        self.hedged = 0
        self._queue: list[GroupRequest] = []
        self._open: dict[int, GroupRequest] = {}
        """Asked for and not yet generated."""
        self._deliver: dict[int, Deliver] = {}
        """Of every group that is asked for and not yet scored."""
        self.supply = WeightSupply(rollout.at_update, lambda rank, said: tell(f"{workers.name_of(rank)} {said}"))
        self._waiting: dict[Any, tuple[Member, int, Callable[..., Any], Callable[[Any], None]]] = {}
        """Reference -> who owes it, in which incarnation, by which call, and what is done with it."""
        self._ids = itertools.count()
        self._durations: list[float] = []
        self._asked_at = self._watched_at = time.monotonic()
        self._failure: BaseException | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="rollout-pool", daemon=True)
        for member in self.members.values():
            self._listen(member)
        self._thread.start()

    @property
    def version(self) -> int:
        """Of the newest weights."""
        return self.supply.version

    def next_id(self) -> int:
        """An id of no other group."""
        return next(self._ids)

    def ask(self, requests: Sequence[GroupRequest], deliver: Deliver) -> None:
        """Asks for groups; waits for nothing. Those that are pinned are split evenly over the workers, in order.

        Args:
            deliver: Called once for each, with the pool's lock held.
        """
        with self.lock:
            self.check()
            self._open |= {request.id: request for request in requests}
            self._deliver |= {request.id: deliver for request in requests}
            self.scoring.expect(requests)
            pinned = [request for request in requests if request.is_pinned]
            ranks = sorted(self.members)
            for rank, share in zip(ranks, np.array_split(np.arange(len(pinned)), len(ranks)), strict=True):
                if len(share):
                    member = self.members[rank]
                    member.round = [pinned[i] for i in share]
                    self._submit(member, member.round)
            self._enqueue(request for request in requests if not request.is_pinned)
            self._lease()
            if self._queue:
                # They say when there is room from now on.
                for member in self.members.values():
                    self._call(member, lambda _: None, RolloutWorker.hurry)

    def publish(self, weights: Any, version: int) -> None:
        """Sends weights to every worker; waits for nothing.

        Args:
            weights: A reference to a snapshot, as `Trainer.weights` returns it.
        """
        with self.lock:
            self.check()
            self.supply.snapshot, self.supply.version = weights, version
            for member in self.members.values():
                self._send_weights(member)
            self.supply.supply(self.members.values(), self._send_weights)

    def add_worker(self) -> int:
        """One more worker, which takes part as soon as it is up. Returns its rank."""
        with self.lock:
            rank = self.workers.add()
            self.members[rank] = member = Member(rank)
            self._send_weights(member)
            self._listen(member)
            return rank

    def remove_worker(self, rank: int) -> None:
        """Ends a worker; what it had not given back is asked of others."""
        with self.lock:
            if len(self.members) == 1:
                raise ValueError(f"{self.workers.name_of(rank)} is the last worker")
            member = self.members.pop(rank)
            member.incarnation += 1
            self.workers.remove(rank)
            left = self._left_by(member)
            others = sorted(self.members)
            self._enqueue(request for request in left if not request.is_pinned)
            for index, request in enumerate(request for request in left if request.is_pinned):
                heir = self.members[others[index % len(others)]]
                heir.round.append(request)
                self._submit(heir, [request])
            self._lease()

    def wait_until(self, is_done: Callable[[], bool], tick: Callable[[], None]) -> None:
        """Waits for what ``deliver`` brings; the lock is held whenever something is called.

        The wait ends: a worker or server that gives nothing back is replaced, and in the end an error.
        """
        with self.lock:
            while not is_done():
                self.check()
                self.supply.supply(self.members.values(), self._send_weights)
                tick()
                self.lock.wait(POLL_S)

    def check(self) -> None:
        """Raises what has ended the pool, if anything has."""
        if self._failure is not None:
            raise self._failure
        assert not self._is_closed, "the pool is closed"

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends the thread. The workers go on until they are killed."""
        with self.lock:
            self._is_closed = True
            self.lock.notify_all()
            for member in self.members.values():
                self.workers.start(member.rank, RolloutWorker.hurry)
        self._thread.join(timeout_s)

    def metrics(self) -> dict[str, float]:
        """What the workers have done since this was last asked."""
        with self.lock:
            before, self._asked_at = self._asked_at, time.monotonic()
            return metrics_of(self.members, self._asked_at - before) | {
                "fleet/hedged": float(self.hedged),
                "fleet/refused": float(self.refused),
            }

    def counts(self) -> dict[str, int]:
        """Groups by where they are."""
        with self.lock:
            queued = len(self._queue)
            return {"queued": queued, "running": len(self._open) - queued, "scoring": self.scoring.num_groups}

    def _run(self) -> None:
        try:
            while True:
                with self.lock:
                    if self._is_closed:
                        return
                    references = [*self._waiting, *self.scoring.waiting]
                done, _ = self.workers.wait(references, POLL_S)
                with self.lock:
                    if self._is_closed:
                        return
                    for reference in done:
                        self._heard(reference)
                    self._watch()
                    self._lease()
                    self._hedge()
                    self.scoring.watch()
                    self.scoring.start()
                    self.lock.notify_all()
        # What ends this thread is raised in the driver's, at its next call.
        except BaseException as error:
            with self.lock:
                self._failure = error
                self.lock.notify_all()

    def _heard(self, reference: Any) -> None:
        if reference in self.scoring.waiting:
            for request, group, scores in self.scoring.finish(reference):
                self._deliver.pop(request.id)(request, group, scores)
            return
        # One that is gone was of a worker that has been replaced since.
        if reference not in self._waiting:
            return
        member, incarnation, method, then = self._waiting.pop(reference)
        if incarnation != member.incarnation:
            return
        try:
            answer = self.workers.result(member.rank, method, reference)
        except ActorFailure as failure:
            if failure.refused:
                raise RunError(f"{failure}. Nothing of it was used") from failure
            self._replace(member, str(failure))
            return
        member.heard_at, member.is_up = time.monotonic(), True
        then(answer)

    def _call(
        self, member: Member, then: Callable[[Any], None], method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> None:
        reference = self.workers.start(member.rank, method, *args, **kwargs)
        self._waiting[reference] = (member, member.incarnation, method, then)

    def _listen(self, member: Member) -> None:
        then = partial(self._collected, member, member.version)
        self._call(member, then, RolloutWorker.collect, COLLECT_MOST, POLL_S, wants_room=bool(self._queue))

    def _send_weights(self, member: Member) -> None:
        if self.supply.snapshot is not None:
            self._call(member, self.supply.taking(member), RolloutWorker.load_weights, *self.supply.arguments)

    def _submit(self, member: Member, requests: Sequence[GroupRequest]) -> None:
        now = time.monotonic()
        for request in requests:
            member.leases[request.id] = request
            member.leased_at[request.id] = now
            member.num_sent += len(request.seeds)
        self._call(member, lambda _: None, RolloutWorker.submit, [request.to_send() for request in requests])

    def _collected(self, member: Member, least_version: int, said: Collected) -> None:
        """
        Args:
            least_version: Of weights that it had said it has loaded, before it was asked.
        """
        if said.status.version < least_version:
            raise RunError(
                f"{self.workers.name_of(member.rank)} was given policy version {least_version}, and its engine still "
                f"has {said.status.version}: new weights do not reach it"
            )
        for what, began, ended in said.status.spans:
            self.span(self.workers.name_of(member.rank), what, began, ended)
        before, member.status = member.status, said.status
        idle = not member.leases
        if idle or before is None or said.status.steps != before.steps:
            member.moved_at = time.monotonic()
        if said.batch is not None:
            self._require_sound(member, said.batch)
            for index, group_id in enumerate(said.batch.group_ids):
                self._generated(member, group_id, said.batch, index)
        self._listen(member)

    def _generated(self, member: Member, group_id: int, batch: RolloutBatch, index: int) -> None:
        begun = member.give_back(group_id)
        request = self._open.pop(group_id, None)
        if request is None:
            self.refused += 1
            return
        if begun is not None:
            self._durations = [*self._durations[-63:], time.monotonic() - begun]
        for other in self.members.values():
            if group_id in other.leases:
                other.give_back(group_id)
                self._call(other, lambda _: None, RolloutWorker.abort, [group_id])
        self.scoring.add(request, unscored_group(request, batch, index))

    def _require_sound(self, member: Member, batch: RolloutBatch) -> None:
        """Raises RunError when a batch cannot be what was asked for."""
        requests = [member.leases.get(group_id) for group_id in batch.group_ids]
        decode = partial(decode_completions, self.tokenizer)
        problem = arrival_problem(batch, requests, self.version, self.is_token, decode)
        if problem is not None:
            raise RunError(
                f"{self.workers.name_of(member.rank)} returned what cannot be trained or measured: {problem}. "
                "Nothing of it was used"
            )

    def _lease(self) -> None:
        """Gives what is queued to those who have room, most to whom has most."""
        given: dict[int, list[GroupRequest]] = {}
        room = {rank: m.room(self.rollout.max_num_seqs) for rank, m in self.members.items() if m.is_up}
        while self._queue and room:
            rank = max(room, key=lambda rank: (room[rank], -rank))
            if room[rank] <= 0:
                break
            request = self._queue.pop(0)
            given.setdefault(rank, []).append(request)
            room[rank] -= len(request.seeds)
        for rank, requests in given.items():
            self._submit(self.members[rank], requests)

    def _enqueue(self, requests: Iterable[GroupRequest]) -> None:
        self._queue = sorted([*self._queue, *requests], key=lambda request: request.priority)

    def _hedge(self) -> None:
        """Asks an idle worker for a group that another has had for much longer than groups take."""
        if not self.rollout.recovery.hedge or self._queue or len(self._durations) < 8:
            return
        limit = 2 * float(np.median(self._durations))
        now = time.monotonic()
        most = self.rollout.max_num_seqs
        idle = [m for m in self.members.values() if m.is_up and m.room(most) > most // 2]
        slow = sorted(
            (begun, group_id)
            for member in self.members.values()
            for group_id, begun in member.leased_at.items()
            if now - begun > limit and not member.leases[group_id].is_pinned
        )
        for _, group_id in slow:
            holders = [member for member in self.members.values() if group_id in member.leases]
            others = [member for member in idle if member not in holders]
            if len(holders) == 1 and others:
                helper = max(others, key=lambda member: (member.room(most), -member.rank))
                self.hedged += 1
                self._submit(helper, [holders[0].leases[group_id]])

    def _watch(self) -> None:
        """Replaces a worker that does not answer, or whose engine does not move."""
        now = time.monotonic()
        if now - self._watched_at > 2 * POLL_S + self.rollout.recovery.silence_s / 2:
            # It was this process that stood still: what they said meanwhile may not be here yet.
            for member in self.members.values():
                member.heard_at = member.moved_at = now
        self._watched_at = now
        for member in list(self.members.values()):
            name = self.workers.name_of(member.rank)
            limit = self.rollout.recovery.silence_s if member.is_up else self.startup_timeout_s
            if now - member.heard_at > limit:
                self._replace(member, f"{name}: no answer within {limit:.0f} s")
            elif member.leases and member.is_up and now - member.moved_at > self.rollout.timeout_s:
                self._replace(member, f"{name}: no step of its engine within {self.rollout.timeout_s:.0f} s")

    def _replace(self, member: Member, reason: str) -> None:
        """Starts a worker again: it gets the newest weights, and what it had not given back.

        Raises:
            RunError: It has been started again too often.
        """
        name, limit = self.workers.name_of(member.rank), self.rollout.recovery.max_restarts
        if member.incarnation >= limit:
            raise RunError(
                f"{reason}. {name} was started {limit} times again before (rollout.recovery.max_restarts): "
                f"look at logs/ and at its machine's memory"
            )
        left = self._left_by(member)
        member.begin_again(waits_for_weights=self.supply.snapshot is not None)
        self.tell(f"{name} is started again, and {len(left)} groups are asked for again: {reason}")
        self.workers.replace(member.rank)
        self._send_weights(member)
        self._enqueue(request for request in left if not request.is_pinned)
        if any(request.is_pinned for request in left):
            self._submit(member, member.round)
        self._listen(member)

    def _left_by(self, member: Member) -> list[GroupRequest]:
        """What a worker that is lost was asked for, and nobody else is, and has not come."""
        held = {group_id for other in self.members.values() if other is not member for group_id in other.leases}
        return [request for id, request in member.leases.items() if id in self._open and id not in held]
