"""What changes from step to step by itself: the learning rate, and the coefficient of the KL to the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlflow.algorithms.kl_reward import adapt_kl_coef
from rlflow.recipe import TrainerBlock
from rlflow.recipe.algorithm_blocks import KLBlock


@dataclass(frozen=True, slots=True)
class LearningRate:
    """The policy's learning rate: a warm-up, then the schedule over the updates that are left."""

    trainer: TrainerBlock
    num_steps: int
    updates_per_step: int = 1
    critic_steps: int = 0
    """Steps at the beginning in which the critic alone learns: the policy's schedule begins behind them."""

    @property
    def num_updates(self) -> int:
        """Of the policy, in the whole run."""
        return (self.num_steps - self.critic_steps) * self.updates_per_step

    def number(self, step: int, update: int = 0) -> int:
        """Of an update of a step, counted from 0 as those are."""
        return max(0, step - self.critic_steps) * self.updates_per_step + update

    def of(self, step: int, update: int = 0) -> float:
        """That of an update of a step, both counted from 0."""
        number, num_updates = self.number(step, update), self.num_updates
        warmup = self.trainer.warmup_steps * self.updates_per_step
        if number < warmup:
            return self.trainer.learning_rate * (number + 1) / warmup
        done = (number - warmup) / max(1, num_updates - warmup)
        factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
        return self.trainer.learning_rate * factor[self.trainer.schedule]


@dataclass(slots=True)
class KLController:
    """The coefficient of the KL: it moves towards ``kl.target`` where there is one (arXiv 1909.08593, section 2.2)."""

    block: KLBlock
    coef: float | None = None
    """Once it has adapted; the recipe's until then."""

    @property
    def current(self) -> KLBlock:
        """The recipe's block with the coefficient of this step."""
        return self.block if self.coef is None else self.block.model_copy(update={"coef": self.coef})

    def adapt(self, kl: float, num_samples: int) -> dict[str, float]:
        """Moves the coefficient of the next step. Returns this step's metrics.

        Args:
            kl: To the reference, of a sequence in the mean.
        """
        block = self.current
        assert block.target is not None
        self.coef = adapt_kl_coef(block.coef, kl, block.target, block.horizon, num_samples)
        return {"kl/coef": block.coef, "kl/sequence": kl}
