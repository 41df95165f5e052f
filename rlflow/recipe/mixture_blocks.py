"""Demonstrations beside rollouts: what they are, and how much they count."""

from __future__ import annotations

import math

from rlflow.recipe.block import Block, Fraction, NonNegativeInt, PositiveInt
from rlflow.recipe.data_blocks import OneOrSeveral


class MixtureBlock(Block):
    """The weight mu of demonstrations in every step: (1 - mu) of the loss is the rollouts', mu of it theirs."""

    mu_peak: Fraction = 0.9
    """The largest weight, behind the warm-up."""
    mu_valley: Fraction = 0.05
    """The weight at the end of the decay, and from there on; that of mu_peak makes it constant."""
    mu_warmup_steps: NonNegativeInt = 0
    """Steps in which the weight rises in a line from 0 to its peak."""
    mu_decay_steps: NonNegativeInt = 200
    """Steps behind the warm-up in which it falls to the valley, as half a cosine."""
    phi: bool = False
    """Weigh every token of a demonstration with p (1 - p), p being its probability under the policy: what is certain,
    and what is far from the policy, counts for little."""

    def mu(self, step: int) -> float:
        """The weight of demonstrations in a step, counted from 0 (CHORD, arXiv 2508.11408)."""
        if step < self.mu_warmup_steps:
            return self.mu_peak * step / self.mu_warmup_steps
        done = step - self.mu_warmup_steps
        if done >= self.mu_decay_steps:
            return self.mu_valley
        share = 0.5 * (1 + math.cos(math.pi * done / self.mu_decay_steps))
        return self.mu_valley + (self.mu_peak - self.mu_valley) * share


class DemonstrationsBlock(Block):
    train: OneOrSeveral
    """Where they come from: rows with answers, in any form that `sft` takes; `data` says how they are read. Several are
    concatenated."""
    per_step: PositiveInt = 16
    """How many a step trains."""
