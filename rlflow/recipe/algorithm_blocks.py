"""Blocks of online algorithms beside advantage and loss. Every field has its meaning under it.

Columns of the table in presets.py: those of several kinds have a class for each, told apart by one of its keys: what a
kind does not have cannot be written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from rlflow.recipe.block import (
    Block,
    Conflict,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)


class KLBlock(Block):
    coef: NonNegativeFloat
    """Weight of the KL to the reference; 0 needs no reference."""
    estimator: Literal["k1", "k2", "k3", "abs"] = "k3"
    """Schulman's estimators: log-ratio, half its square, or the unbiased positive one; or the log-ratio's size."""
    placement: Literal["loss", "reward"] = "loss"
    """Added to the loss, or subtracted from the reward of each token."""
    unbiased_gradient: bool = False
    """In the loss: multiply by the token's importance ratio, so that the estimate's gradient is the KL's own
    (arXiv 2512.02556)."""
    target: PositiveFloat | None = None
    """Adaptive coefficient towards this KL (arXiv 1909.08593, section 2.2)."""
    horizon: PositiveInt = 10_000
    """Samples over which the adaptive coefficient moves."""

    @property
    def needs_policy_logprobs(self) -> bool:
        """Whether the KL is taken before the update, from what the policy's logprobs were then."""
        return self.coef > 0 and (self.placement == "reward" or self.target is not None)

    def conflicts(self) -> Iterator[Conflict]:
        if self.unbiased_gradient and self.estimator not in ("k1", "k3"):
            reason = f"weights k1 or k3, not {self.estimator}: remove it"
            yield Conflict(("unbiased_gradient", "estimator"), reason)
        if self.unbiased_gradient and self.placement == "reward":
            yield Conflict(("unbiased_gradient", "placement"), "is of the KL in the loss: set placement: loss")
        if self.target is not None and not self.coef:
            yield Conflict(("target", "coef"), "moves kl.coef by a factor, and 0 stays 0: set kl.coef")
        yield from self.idle("horizon", "target")


class CorrectionBlock(Block):
    """Between engine and trainer: what every mode has."""

    mode: str
    old_policy: Literal["engine", "trainer"] = "trainer"
    """Denominator of the ratio: the trainer's own logprobs before the first update, or as the engine sampled."""

    def cut_conflicts(self, cut_by: str) -> Iterator[Conflict]:
        """What asks for the engine's logprobs, where ``cut_by`` makes them another distribution's."""
        verb = "bends" if cut_by.endswith("repetition_penalty") else "cuts"
        why = f"{cut_by} {verb} sampling, so the engine's logprobs are of another distribution than the trainer's"
        if self.old_policy == "engine":
            yield Conflict(("old_policy", cut_by), f"{why}: set old_policy: trainer, or remove {cut_by}")
        elif self.mode != "none":
            yield Conflict(("mode", cut_by), f"{why}: set mode: none, or remove {cut_by}")


class BoundedWeightBlock(CorrectionBlock):
    mode: Literal["truncate", "mask", "weighted_mask"] = "truncate"
    """Cut the importance weight, drop tokens whose weight is out of bounds, or drop these and weigh the others. Where
    sampling is cut, and with old_policy: engine, the default is none."""
    old_policy: Literal["trainer"] = "trainer"
    """The weight is between engine and trainer, so the ratio has the trainer's logprobs."""
    level: Literal["token", "sequence", "sequence_mean"] = "token"
    """A weight a token, the product over a sequence, or the geometric mean over it."""
    low: NonNegativeFloat = 0.0
    """Weights below are raised to it (truncate) or dropped; 0 is no lower bound."""
    high: PositiveFloat = 2.0
    """Weights above are lowered to it (truncate) or dropped."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.low >= self.high:
            yield Conflict(("low", "high"), f"{self.low:g} is not below high ({self.high:g}): no weight is within")


class UncorrectedBlock(CorrectionBlock):
    mode: Literal["none"] = "none"
    """No weight."""


Correction = BoundedWeightBlock | UncorrectedBlock


class GroupBlock(Block):
    require_signal: bool = False
    """Replace groups whose rewards are all equal (DAPO's dynamic sampling)."""
    max_resamples: PositiveInt = 3
    """How many times a step may draw replacement prompts before it trains on what it has."""
    mask_truncated: bool = False
    """Leave completions that hit max_new_tokens out of the loss (overlong filtering)."""
    count_masked: bool = False
    """Whether completions left out of the loss (truncated or unscored) still count in its denominators."""
    overlong_buffer: Fraction = 0.0
    """Share of max_new_tokens, at its end, over which soft overlong punishment rises (DAPO, eq. 13); 0 is off."""
    overlong_penalty: NonNegativeFloat = 1.0
    """Largest soft overlong punishment."""
    updates_per_step: PositiveInt = 1
    """Optimizer updates (mini-batches) one rollout batch is split into."""
    epochs_per_step: PositiveInt = 1
    """Passes over one rollout batch."""
    reward_scaling: Literal["sum", "normalize_each", "normalize_sum"] = "sum"
    """How several rewards combine: weighted sum, each normalised in its group first, or the sum normalised over the
    batch."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from self.idle("max_resamples", "require_signal")
        yield from self.idle("overlong_penalty", "overlong_buffer")


class CriticBlock(Block):
    learning_rate: PositiveFloat = 1e-5
    """Of the value model, in every step: trainer.schedule and trainer.warmup_steps are the policy's."""
    clip: PositiveFloat | None = 0.2
    """Value clipping range (arXiv 1707.06347's implementation; 2005.12729)."""
    path: str | None = None
    """A model to start from; the policy's own when absent."""
    warmup_steps: NonNegativeInt = 0
    """Steps in which only the critic learns."""
    workers: PositiveInt = 1
    """Ranks."""
    cpus_per_worker: PositiveFloat | None = None
    """Ray CPUs, and compute threads, of each rank. Left out: 1 Ray CPU, and as many threads as there are cores that
    nobody else computes on meanwhile, where the run starts Ray itself and the rank has no GPU."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """Ray GPUs of each rank."""
