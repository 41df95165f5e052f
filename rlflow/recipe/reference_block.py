"""The frozen model that a policy is compared with."""

from __future__ import annotations

from rlflow.recipe.block import Block, NonNegativeFloat, PositiveInt
from rlflow.recipe.model_blocks import ModelBlock


class ReferenceBlock(Block):
    path: str | None = None
    """A model; the policy's starting point when absent. Of an adapter that is the trainer itself with the adapter off,
    or with the one that it goes on from; `model.path` means without any."""
    adapter: str | None = None
    """A PEFT directory or hub id: the reference is `path`, or the policy's base, with this adapter. A trainer of
    adapters of the same base and method holds it beside its own."""
    precompute: bool = False
    """Offline: score all rows once before the first step, then end the reference actors; otherwise each step's rows
    are scored on the fly."""
    workers: PositiveInt = 1
    """ReferenceModel actors."""
    cpus_per_worker: NonNegativeFloat | None = None
    """Ray CPUs, and compute threads, of each. Left out: as of the trainer."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """Ray GPUs of each."""

    def is_beside(self, policy: ModelBlock) -> bool:
        """Whether the policy's trainer can be the reference: it has that base, with an adapter to turn off."""
        if policy.adapter is None:
            return False
        # A base in few bits is another model than the one on disk.
        is_same_base = self.path == policy.path and policy.adapter.quantize == "none"
        return self.path is None or is_same_base

    def held_adapter(self, policy: ModelBlock) -> str | None:
        """The adapter that makes the base of a policy's adapter its reference; None where the base alone is it."""
        adapter = policy.adapter
        if self.adapter is not None or adapter is None:
            return self.adapter
        goes_on = self.path is None and adapter.prepared_start is None
        return adapter.path if goes_on else None
