"""Blocks within the recipe's rollout block, and what else there is to say of sampling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from rlflow.recipe.block import Block, Conflict, NonNegativeInt, PositiveFloat


class SamplingBlock(Block):
    min_p: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    """Cuts tokens with less than this share of the most probable one's probability, before top_k and top_p
    (arXiv 2407.01082)."""
    repetition_penalty: PositiveFloat = 1.0
    """Above 1, tokens that the prompt or the completion has become less probable (arXiv 1909.05858)."""
    stop: list[str] = Field(default_factory=list)
    """Texts that end a completion, e.g. ["</answer>"]: with the token that completes one, which is kept and trained."""

    def conflicts(self) -> Iterator[Conflict]:
        if "" in self.stop:
            yield Conflict(("stop",), "has an empty text, with which nothing could be written: remove it")


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
    transport: Literal["auto", "objects", "ipc", "collective"] = "auto"
    """How new weights get to workers: out of Ray's object store, or from the trainer's own memory, mapped (ipc) or
    broadcast (collective). A worker with which it fails takes objects. On GPUs ipc (trainer and worker share one) and
    collective (each has whole ones) have not been run yet: auto is objects."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.running == "wait" and self.transport in ("ipc", "collective"):
            reason = "the trainer would wait for completions under way: leave it out, or set running: continue"
            yield Conflict(("transport", "running"), reason)


class RecoveryBlock(Block):
    max_restarts: NonNegativeInt = 3
    """A rollout worker that dies, hangs or says nothing is started again, so many times; then the run ends."""
    silence_s: PositiveFloat = 60.0
    """A worker that says nothing for so long is taken for lost."""
    hedge: bool = True
    """With run.max_staleness: a group that one worker has had for more than twice as long as groups take is asked of an
    idle one too, and the first answer counts."""
