"""Generated groups to reward servers, and back with their scores.

A server that is idle takes what has come by then. Where a reward function wants the completions of several prompts in
one call (``prompts_per_call``), a round is scored as a whole, in the order in which it was asked for: what a call holds
must not depend on who was faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlflow.actors.actor_group import ActorFailure, ActorGroup, Span
from rlflow.actors.reward_pool import START_TIMEOUT_S
from rlflow.actors.reward_server import RESTART_S, WASTED_CALLS, RewardServer
from rlflow.driver.errors import RunError
from rlflow.recipe import RewardBlock
from rlflow.rewards.score_batch import GroupTexts, ScoreBatch
from rlflow.types import Group, GroupRequest

MAX_RESTARTS = 3
Unscored = tuple[GroupRequest, Group]
"""A group that is generated, and what was asked for."""
Deliver = Callable[[GroupRequest, Group, ScoreBatch], None]
"""Takes a group that is generated, and its scores."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a server was asked to score."""

    server: int
    groups: list[Unscored]
    limit_s: float
    """A server that takes longer does not work any more."""
    began: float = field(default_factory=time.time)
    """In seconds since 1970."""
    asked_at: float = field(default_factory=time.monotonic)

    @property
    def deadline(self) -> float:
        return self.asked_at + self.limit_s


class Scoring:
    def __init__(
        self,
        servers: ActorGroup[RewardServer],
        rewards: Sequence[RewardBlock],
        span: Span = lambda actor, name, began, ended: None,
        tell: Callable[[str], None] = lambda message: None,
    ) -> None:
        """
        Args:
            rewards: All that the servers have, those of an evaluation too.
            span: Called with what each server did, and when.
            tell: Called with what users should know, e.g. that a server was started again.
        """
        self.servers, self.span, self.tell = servers, span, tell
        self.waiting: dict[Any, Call] = {}
        """Reference -> what is owed."""
        self._blocks = {block.label: block for block in rewards}
        self._by_round = {block.label for block in rewards if block.prompts_per_call > 1}
        self._rounds: dict[int, dict[int, Unscored | None]] = {}
        """Of rounds that are scored as a whole: group -> what has come of it, in the order it was asked for."""
        self._round_of: dict[int, int] = {}
        self._units: list[tuple[bool, list[Unscored]]] = []
        """Ready to be scored; whether they are a call of their own."""
        self._restarts = dict.fromkeys(servers.ranks, 0)

    @property
    def num_groups(self) -> int:
        """Groups that are generated and not yet scored."""
        waiting = sum(len(call.groups) for call in self.waiting.values()) + sum(len(unit) for _, unit in self._units)
        return waiting + sum(group is not None for of_round in self._rounds.values() for group in of_round.values())

    def expect(self, requests: Sequence[GroupRequest]) -> None:
        """Says what is asked for together."""
        if requests and self._by_round.intersection(requests[0].labels):
            number = requests[0].id
            self._rounds[number] = {request.id: None for request in requests}
            self._round_of |= {request.id: number for request in requests}

    def add(self, request: GroupRequest, group: Group) -> None:
        """Takes a group that is generated."""
        number = self._round_of.pop(request.id, None)
        if number is None:
            self._units.append((False, [(request, group)]))
            return
        of_round = self._rounds[number]
        of_round[request.id] = (request, group)
        whole = [unscored for unscored in of_round.values() if unscored is not None]
        if len(whole) == len(of_round):
            del self._rounds[number]
            for share in np.array_split(np.arange(len(whole)), len(self.servers)):
                if len(share):
                    self._units.append((True, [whole[i] for i in share]))

    def start(self) -> None:
        """Gives what is ready to servers that are idle."""
        busy = {call.server for call in self.waiting.values()}
        idle = [server for server in self.servers.ranks if server not in busy]
        while idle and self._units:
            is_own_call, groups = self._units[0]
            if is_own_call:
                del self._units[0]
            else:
                groups = self._loose(len(idle))
            self._call(idle.pop(0), groups)

    def finish(self, reference: Any) -> Iterator[tuple[GroupRequest, Group, ScoreBatch]]:
        """The groups of a call that has ended, each with its scores; none when its server died, and they are scored
        again.

        Raises:
            ActorFailure: The server failed otherwise.
            RunError: It died too often.
        """
        call = self.waiting.pop(reference)
        self.span(self.servers.name_of(call.server), "score", call.began, time.time())
        try:
            scores = self.servers.result(call.server, RewardServer.score, reference)
        except ActorFailure as failure:
            if not failure.died:
                raise
            self._again(call, str(failure))
            return
        of_groups = scores.split([group for _, group in call.groups])
        for (request, group), of_group in zip(call.groups, of_groups, strict=True):
            yield request, group, of_group

    def watch(self) -> None:
        """Replaces a server that has not answered when its call must have ended.

        Raises:
            RunError: It was replaced too often.
        """
        now = time.monotonic()
        for reference, call in list(self.waiting.items()):
            if now > call.deadline:
                del self.waiting[reference]
                self._again(call, f"{self.servers.name_of(call.server)}.score: no answer within {call.limit_s:.0f} s")

    def _again(self, call: Call, reason: str) -> None:
        """Starts the server of a call again, and has the call's groups scored."""
        name = self.servers.name_of(call.server)
        self._restarts[call.server] += 1
        if self._restarts[call.server] > MAX_RESTARTS:
            raise RunError(f"{reason}; it was started {MAX_RESTARTS} times again before")
        self.tell(f"{name} is started again, and {len(call.groups)} groups are scored again: {reason}")
        self.servers.replace(call.server)
        self._units.insert(0, (True, call.groups))

    def limit_s(self, groups: Sequence[Unscored]) -> float:
        """How long a server that works may take over them, all of whose functions have deadlines of their own."""
        rows = sum(len(group.rollouts) for _, group in groups)
        # A call that fails is made again for each of its rows.
        blocks = [self._blocks[label] for label in groups[0][0].labels]
        calls = len(groups) + rows + WASTED_CALLS + 1
        return START_TIMEOUT_S + sum(calls * (block.timeout_s + RESTART_S) for block in blocks)

    def _loose(self, num_servers: int) -> list[Unscored]:
        """One server's share of the groups that may be scored in any company."""
        together = self._units[0][1][0][0].labels
        loose = [
            place
            for place, (is_own_call, groups) in enumerate(self._units)
            if not is_own_call and groups[0][0].labels == together
        ]
        chosen = loose[: -(-len(loose) // num_servers)]
        groups = [self._units[place][1][0] for place in chosen]
        taken = set(chosen)
        self._units = [unit for place, unit in enumerate(self._units) if place not in taken]
        return groups

    def _call(self, server: int, groups: list[Unscored]) -> None:
        texts = [GroupTexts.of(group) for _, group in groups]
        reference = self.servers.start(server, RewardServer.score, texts, groups[0][0].labels)
        self.waiting[reference] = Call(server, groups, self.limit_s(groups))
