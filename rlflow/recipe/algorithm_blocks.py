"""The blocks of a recipe's algorithm: the columns of the table in presets.py. Every field has its meaning under it.

A block of several kinds has a class for each, told apart by one of its keys: what a kind does not have cannot be
written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from rlflow.recipe.block import (
    Block,
    Conflict,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    PositiveFloat,
    PositiveInt,
    malformed_function,
)

Reduction = Literal["token", "sequence", "prompt", "fixed_length"]
Smoothing = Annotated[float, Field(strict=True, ge=0, lt=0.5)]


class AdvantageBlock(Block):
    """What every estimator has."""

    estimator: str
    whiten: bool = False
    """Normalise advantages over the loss tokens of the batch to mean 0, variance 1 (PPO, REINFORCE++)."""
    ddof: Literal[0, 1] = 1
    """Delta degrees of freedom of the standard deviations of scale, whiten and groups.reward_scaling."""
    eps: PositiveFloat = 1e-4
    """Added to the standard deviations of scale and groups.reward_scaling."""


class BaselineBlock(AdvantageBlock):
    estimator: Literal["group_mean", "leave_one_out", "batch_mean"] = "group_mean"
    """What is subtracted from the reward: the group's mean, the mean of the others (RLOO), or the batch's mean."""
    scale: Literal["none", "group_std", "batch_std"] = "none"
    """What the difference is divided by: nothing, or the standard deviation of the group's or the batch's rewards."""


class ReturnBlock(AdvantageBlock):
    estimator: Literal["return"] = "return"
    """Nothing is subtracted: a token gets the rewards that follow it (REINFORCE++)."""
    gamma: Fraction = 1.0
    """Discount."""


class GAEBlock(AdvantageBlock):
    estimator: Literal["gae"] = "gae"
    """A critic's values are subtracted (arXiv 1506.02438)."""
    gamma: Fraction = 1.0
    """Discount."""
    gae_lambda: Fraction = 0.95
    """1 trusts the rewards alone, 0 the critic's next value."""


class OwnAdvantageBlock(AdvantageBlock):
    estimator: Literal["function"]
    """Your own; `estimator: file.py:function` says the same, see docs/extend.md."""
    plugin: str
    """`file.py:function` of what it names of rewards, group_of and lengths."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from malformed_function("plugin", self.plugin)


Advantage = BaselineBlock | ReturnBlock | GAEBlock | OwnAdvantageBlock


class LossBlock(Block):
    reduction: Reduction = "token"
    """Mean over all tokens; over sequences of token means; over prompts of token means; sum over a fixed length."""


class PolicyLossBlock(LossBlock):
    """What every policy loss has."""

    kind: str
    ratio: Literal["token", "sequence", "sequence_token", "sequence_product"] = "token"
    """Importance ratio of a token, geometric mean over the sequence (GSPO), GSPO's token variant, or product over the
    sequence (RLOO)."""
    entropy_coef: Number = 0.0
    """Weight of the entropy bonus."""


class ClipBlock(PolicyLossBlock):
    kind: Literal["clip"] = "clip"
    """PPO's pessimistic clip."""
    clip_low: NonNegativeFloat = 0.2
    """Ratios below 1 - clip_low are clipped; 1 is no lower bound."""
    clip_high: NonNegativeFloat = 0.2
    """Ratios above 1 + clip_high are clipped."""
    dual_clip: Annotated[float, Field(strict=True, gt=1)] | None = None
    """Lower bound c of the objective for negative advantages (arXiv 1912.09729, eq. 5)."""


class CISPOBlock(PolicyLossBlock):
    kind: Literal["cispo"] = "cispo"
    """A clipped weight under a stop-gradient."""
    clip_low: NonNegativeFloat = 1.0
    """Weights below 1 - clip_low are raised to it; 1 is no lower bound."""
    clip_high: NonNegativeFloat = 4.0
    """Weights above 1 + clip_high are lowered to it."""


class SAPOBlock(PolicyLossBlock):
    kind: Literal["sapo"] = "sapo"
    """A smooth gate."""
    tau_positive: PositiveFloat = 1.0
    """The gate's temperature for positive advantages."""
    tau_negative: PositiveFloat = 1.05
    """The gate's temperature for negative advantages."""


class OwnLossBlock(PolicyLossBlock):
    kind: Literal["function"]
    """Your own; `kind: file.py:function` says the same, see docs/extend.md."""
    plugin: str
    """`file.py:function` of what it names of ratio, log_ratio, logprobs, old_logprobs, engine_logprobs, ref_logprobs,
    advantages, sequence_ids and num_sequences."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from malformed_function("plugin", self.plugin)


PolicyLoss = ClipBlock | CISPOBlock | SAPOBlock | OwnLossBlock


class KLBlock(Block):
    coef: NonNegativeFloat
    """Weight of the KL to the reference; 0 needs no reference."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Schulman's estimators: log-ratio, half its square, or the unbiased positive one."""
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
        if self.unbiased_gradient and self.estimator == "k2":
            reason = "weights k1 or k3 (k2's gradient needs no weight): remove it"
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
    cpus_per_worker: PositiveFloat = 1.0
    """Ray CPUs, and compute threads, of each rank."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """Ray GPUs of each rank."""


class PairLossBlock(Block):
    """What every loss of a pair has."""

    loss: str
    beta: PositiveFloat = 0.1
    """Temperature of the implicit reward."""
    sft_coef: NonNegativeFloat = 0.0
    """Weight of the negative log-likelihood of the chosen answers, averaged as loss.reduction says."""
    reference_free: bool = False
    """Take the reference as uniform."""
    length_normalized: bool = False
    """Divide an answer's log-ratio by its number of tokens (SimPO, ORPO; TRL's ipo)."""


class SigmoidBlock(PairLossBlock):
    loss: Literal["sigmoid"] = "sigmoid"
    """DPO's."""
    label_smoothing: Smoothing = 0.0
    """Probability that a label is flipped."""
    gamma: NonNegativeFloat = 0.0
    """Target margin (SimPO)."""


class SmoothedBlock(PairLossBlock):
    loss: Literal["robust", "aot", "aot_unpaired"]
    """See docs/algorithms.md."""
    label_smoothing: Smoothing = 0.0
    """Probability that a label is flipped."""


class EXOBlock(PairLossBlock):
    loss: Literal["exo_pair"]
    """See docs/algorithms.md."""
    label_smoothing: Annotated[float, Field(strict=True, gt=0, lt=0.5)] = 1e-3
    """Its epsilon."""


class PlainPairBlock(PairLossBlock):
    loss: Literal["hinge", "ipo", "nca_pair", "bco_pair", "sppo", "apo_zero", "apo_down", "discopop"]
    """See docs/algorithms.md."""


class ORPOBlock(PairLossBlock):
    loss: Literal["orpo"]
    """Takes odds of mean logprobs; the row orpo has the likelihood of the chosen answers beside it."""
    reference_free: Literal[True] = True
    """There is no reference."""
    length_normalized: Literal[True] = True
    """Always."""


class OwnPairBlock(PairLossBlock):
    loss: Literal["function"]
    """Your own; `loss: file.py:function` says the same, see docs/extend.md."""
    plugin: str
    """`file.py:function` of what it names of chosen, rejected and beta."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from malformed_function("plugin", self.plugin)


PairLoss = SigmoidBlock | SmoothedBlock | EXOBlock | PlainPairBlock | ORPOBlock | OwnPairBlock


class KTOLossBlock(Block):
    beta: PositiveFloat = 0.1
    """Temperature of the implicit reward."""
    desirable_weight: PositiveFloat = 1.0
    """Weight of desirable examples."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of undesirable examples."""


class RewardLossBlock(Block):
    center_coef: NonNegativeFloat = 0.0
    """Weight of the squared sum of the pair's rewards, which centres them."""
