"""The newest weights, as a pool has them for its workers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from rlflow.actors.weight_intake import WeightsTaken
from rlflow.driver.errors import RunError
from rlflow.driver.leases import Member
from rlflow.recipe.rollout_blocks import AtUpdateBlock


class WeightSupply:
    def __init__(self, at_update: AtUpdateBlock, tell: Callable[[int, str], None]) -> None:
        """
        Args:
            tell: Called with a worker's rank and what users should know of its weights.
        """
        self._at_update, self._tell = at_update, tell
        self.version = -1
        """Of the newest weights."""
        self.snapshot: Any = None
        """A reference to them; None before the first."""
        self.again: Callable[[], Any] = lambda: None
        """Has them sent once more, in a snapshot that is whole; None where the trainer has newer ones by now."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of `RolloutWorker.load_weights`."""
        return self.snapshot, self._at_update.running, self._at_update.cache

    def taking(self, member: Member) -> Callable[[WeightsTaken], None]:
        """What is done with a worker's answer to the newest weights."""
        version = self.version

        def taken(answer: WeightsTaken) -> None:
            if answer.are_here:
                member.version, member.waits_for_weights = max(member.version, version), False
                member.lacks_weights &= member.version < self.version
            # Of older ones it does not matter: newer ones are on their way.
            elif version == self.version:
                member.lacks_weights = True
            if answer.said:
                self._tell(member.rank, answer.said)

        return taken

    def supply(self, members: Collection[Member], send: Callable[[Member], None]) -> None:
        """Has the newest weights sent again where workers came too late for them.

        Trainers are asked: whoever calls this is the one that asks them, and waits for nothing of theirs.

        Args:
            send: Called with each of those workers, once the weights are there.

        Raises:
            RunError: Nobody has that version any more, and work waits for it.
            ActorFailure: A trainer could not gather them: which one.
        """
        lacking = [member for member in members if member.lacks_weights]
        snapshot = self.again() if lacking else None
        if snapshot is not None:
            self.snapshot = snapshot
            for member in lacking:
                member.lacks_weights = False
                send(member)
        elif lacking and len(lacking) == len(members):
            raise RunError(
                f"every rollout worker was lost, and with them policy version {self.version}, which the trainer has "
                "moved on from: go on from the newest checkpoint with --resume"
            )
