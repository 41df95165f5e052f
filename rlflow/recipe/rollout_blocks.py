"""Blocks within the recipe's rollout block."""

from __future__ import annotations

from typing import Literal

from rlflow.recipe.block import Block, NonNegativeInt, PositiveFloat


class AtUpdateBlock(Block):
    running: Literal["continue", "restart", "wait"] = "continue"
    """Completions under way when new weights come: they go on with them, are begun anew, or the weights wait for them
    and nothing is begun meanwhile."""
    cache: Literal["recompute", "keep"] = "recompute"
    """Keys and values of those that go on: computed again with the new weights, or kept, which costs nothing and mixes
    the two."""
    too_old: Literal["redo", "drop"] = "redo"
    """A group in which a token is older than run.max_staleness allows: it is generated again, or left out of its
    step."""


class RecoveryBlock(Block):
    max_restarts: NonNegativeInt = 3
    """A rollout worker that dies, hangs or says nothing is started again, so many times; then the run ends."""
    silence_s: PositiveFloat = 60.0
    """A worker that says nothing for so long is taken for lost."""
    hedge: bool = True
    """With run.max_staleness: a group that one worker has had for more than twice as long as groups take is asked of an
    idle one too, and the first answer counts."""
