"""What the pool knows of each rollout worker."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from rlflow.actors.rollout_worker import WorkerStatus
from rlflow.types import GroupRequest


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker has done in some time."""

    tokens: int = 0
    """Of completions that ended."""
    busy_s: float = 0.0
    load_s: float = 0.0
    reread_tokens: int = 0


@dataclass(slots=True)
class Member:
    """A rollout worker, as the pool knows it."""

    rank: int
    incarnation: int = 0
    """How often it was started again."""
    leases: dict[int, GroupRequest] = field(default_factory=dict)
    """What it was asked for and has not given back, by group."""
    leased_at: dict[int, float] = field(default_factory=dict)
    round: list[GroupRequest] = field(default_factory=list)
    """All pinned groups that it was asked for last, given back or not; none once it has given back all."""
    heard_at: float = field(default_factory=time.monotonic)
    is_up: bool = False
    """It has answered since it was started."""
    version: int = -1
    """Of the newest weights that it has said it has loaded."""
    waits_for_weights: bool = False
    """It was started again, and is asked for nothing before it has weights."""
    lacks_weights: bool = False
    """The newest are gone past it: they are sent again."""
    status: WorkerStatus | None = None
    moved_at: float = field(default_factory=time.monotonic)
    """When its engine had last made a step, or had nothing to do."""

    told: Work = Work()
    """What `take_done` has said of this incarnation."""
    num_sent: int = 0
    """Completions that it was ever asked for."""

    def give_back(self, group_id: int) -> float | None:
        """Takes a group from what it was asked for. Returns when it was asked for that, if it was."""
        self.leases.pop(group_id, None)
        if not self.leases:
            # Who asked for them keeps what came of them.
            self.round = []
        return self.leased_at.pop(group_id, None)

    def begin_again(self, *, waits_for_weights: bool = False) -> None:
        """Forgets all that the one before said and was asked for; ``round`` stays."""
        self.incarnation += 1
        self.waits_for_weights, self.lacks_weights = waits_for_weights, False
        self.is_up, self.version, self.num_sent = False, -1, 0
        self.status, self.told = None, Work()
        self.leases, self.leased_at = {}, {}
        self.heard_at = self.moved_at = time.monotonic()

    def take_done(self) -> Work:
        """What it has done since the last call."""
        if self.status is None:
            return Work()
        said, before = self.status, self.told
        self.told = Work(said.tokens, said.busy_s, said.load_s, said.reread_tokens)
        return Work(
            said.tokens - before.tokens,
            said.busy_s - before.busy_s,
            said.load_s - before.load_s,
            said.reread_tokens - before.reread_tokens,
        )

    def room(self, max_num_seqs: int) -> int:
        """How many completions more it could write at the same time, as far as it has said; it is believed as long as
        it owes any."""
        if self.waits_for_weights:
            return 0
        if not self.leases:
            return max_num_seqs
        if self.status is None:
            return max_num_seqs - self.num_sent
        on_their_way = self.num_sent - self.status.num_taken
        return max_num_seqs - self.status.num_running - self.status.num_waiting - on_their_way


def metrics_of(members: Mapping[int, Member], seconds: float) -> dict[str, float]:
    """What the workers have done in so many seconds, since this was last asked."""
    done = {rank: member.take_done() for rank, member in members.items()}
    metrics = {
        "fleet/workers": float(len(members)),
        "fleet/restarts": float(sum(member.incarnation for member in members.values())),
    }
    for rank, work in done.items():
        metrics[f"fleet/{rank}/busy_fraction"] = work.busy_s / max(1e-9, seconds)
        metrics[f"fleet/{rank}/tokens_per_s"] = work.tokens / max(1e-9, work.busy_s)
    slowest = max((work.busy_s for work in done.values()), default=0.0)
    return metrics | {
        "time/generate_s": slowest,
        "perf/generated_tokens_per_s": sum(work.tokens for work in done.values()) / max(1e-9, slowest),
        "sync/load_s": max((work.load_s for work in done.values()), default=0.0),
        "sync/reread_tokens": float(sum(work.reread_tokens for work in done.values())),
    }
