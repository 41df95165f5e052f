"""The recipe's algorithm block: the columns of the table in presets.py. Every field has its meaning under it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, field_validator

from rlflow.recipe.block import (
    Block,
    Conflict,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    PositiveFloat,
    PositiveInt,
)
from rlflow.recipe.presets import ALGORITHMS, Learning
from rlflow.recipe.problems import did_you_mean
from rlflow.recipe.used_options import unused_options


class AdvantageBlock(Block):
    estimator: Literal["group_mean", "leave_one_out", "batch_mean", "return", "gae"] = "group_mean"
    """What is subtracted from the reward: the group's mean, the mean of the others (RLOO), the batch's mean, nothing
    (REINFORCE++), or a critic's value."""
    scale: Literal["none", "group_std", "batch_std"] = "none"
    """What the difference is divided by: nothing, or the standard deviation of the group's or the batch's rewards."""
    ddof: Literal[0, 1] = 1
    """Delta degrees of freedom of that standard deviation."""
    eps: PositiveFloat = 1e-4
    """Added to the standard deviation."""
    whiten: bool = False
    """Normalise advantages over the loss tokens of the batch to mean 0, variance 1 (PPO, REINFORCE++)."""
    gamma: Fraction = 1.0
    """Discount of gae and return."""
    gae_lambda: Fraction = 0.95
    """Lambda of gae."""


class PolicyLossBlock(Block):
    kind: Literal["clip", "cispo", "sapo"] = "clip"
    """clip: PPO's pessimistic clip; cispo: clipped weight under a stop-gradient; sapo: a smooth gate."""
    ratio: Literal["token", "sequence", "sequence_token", "sequence_product"] = "token"
    """Importance ratio of a token, geometric mean over the sequence (GSPO), GSPO's token variant, or product over the
    sequence (RLOO)."""
    clip_low: NonNegativeFloat = 0.2
    """Ratios below 1 - clip_low are clipped; 1 is no lower bound."""
    clip_high: NonNegativeFloat = 0.2
    """Ratios above 1 + clip_high are clipped."""
    dual_clip: Annotated[float, Field(strict=True, gt=1)] | None = None
    """Lower bound c of the objective for negative advantages (arXiv 1912.09729, eq. 5)."""
    reduction: Literal["token", "sequence", "prompt", "fixed_length"] = "token"
    """Mean over all tokens; over sequences of token means; over prompts of token means; sum over a fixed length."""
    entropy_coef: Number = 0.0
    """Weight of the entropy bonus."""
    sapo_tau_positive: PositiveFloat = 1.0
    """SAPO's gate temperature for positive advantages."""
    sapo_tau_negative: PositiveFloat = 1.05
    """SAPO's gate temperature for negative advantages."""


class KLBlock(Block):
    coef: NonNegativeFloat = 0.0
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


class CorrectionBlock(Block):
    old_policy: Literal["engine", "trainer"] = "trainer"
    """Denominator of the ratio: the trainer's own logprobs before the first update, or as the engine sampled."""
    mode: Literal["none", "truncate", "mask", "weighted_mask"] = "truncate"
    """Between engine and trainer (needs old_policy: trainer, whole sampling): cut the importance weight, drop tokens
    whose weight is out of bounds, or drop these and weigh the others. Where that cannot be, the default is none."""
    level: Literal["token", "sequence", "sequence_mean"] = "token"
    """A weight a token, the product over a sequence, or the geometric mean over it."""
    low: NonNegativeFloat = 0.0
    """Weights below are raised to it (truncate) or dropped; 0 is no lower bound."""
    high: PositiveFloat = 2.0
    """Weights above are lowered to it (truncate) or dropped."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.mode != "none" and self.old_policy == "engine":
            reason = "corrects between engine and trainer, so it needs the trainer's logprobs: set old_policy: trainer"
            yield Conflict(("mode", "old_policy"), reason)
        if self.mode != "none" and self.low >= self.high:
            yield Conflict(("low", "high"), f"{self.low:g} is not below high ({self.high:g}): no weight is within")

    def cut_conflicts(self, cut_by: str) -> Iterator[Conflict]:
        """What asks for the engine's logprobs, where ``cut_by`` makes them another distribution's."""
        why = f"{cut_by} cuts sampling, so the engine's logprobs are of another distribution than the trainer's"
        if self.old_policy == "engine":
            yield Conflict(("old_policy", cut_by), f"{why}: set old_policy: trainer, or remove {cut_by}")
        elif self.mode != "none":
            yield Conflict(("mode", cut_by), f"{why}: set mode: none, or remove {cut_by}")


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


class PreferenceBlock(Block):
    loss: Literal[
        "sigmoid",
        "hinge",
        "ipo",
        "robust",
        "exo_pair",
        "nca_pair",
        "bco_pair",
        "sppo",
        "aot",
        "aot_unpaired",
        "apo_zero",
        "apo_down",
        "discopop",
        "orpo",
    ] = "sigmoid"
    """Loss of a pair; kto and reward_model have their own."""
    beta: PositiveFloat = 0.1
    """Temperature of the implicit reward."""
    label_smoothing: Annotated[float, Field(strict=True, ge=0, lt=0.5)] = 0.0
    """Probability that a label is flipped (sigmoid, robust, aot, aot_unpaired), or exo_pair's epsilon."""
    sft_coef: NonNegativeFloat = 0.0
    """Weight of the negative log-likelihood of the chosen answers, averaged as loss.reduction says."""
    reference_free: bool = False
    """Take the reference as uniform."""
    length_normalized: bool = False
    """Divide an answer's log-ratio by its number of tokens (SimPO, ORPO; TRL's ipo)."""
    gamma: NonNegativeFloat = 0.0
    """Target margin of sigmoid (SimPO)."""
    desirable_weight: PositiveFloat = 1.0
    """KTO's weight of desirable examples."""
    undesirable_weight: PositiveFloat = 1.0
    """KTO's weight of undesirable examples."""
    center_coef: NonNegativeFloat = 0.0
    """Reward modelling: weight of the squared sum of the pair's rewards, which centres them."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.loss == "exo_pair" and not self.label_smoothing:
            yield Conflict(("loss", "label_smoothing"), "exo_pair takes the logarithm of label_smoothing: set 1.0e-3")
        if self.loss == "orpo" and not (self.reference_free and self.length_normalized):
            reason = "orpo takes odds of mean logprobs: set reference_free and length_normalized, or use the row orpo"
            yield Conflict(("loss", "reference_free"), reason)


class AlgorithmBlock(Block):
    name: str
    """A row of the table: `rlflow algorithms` lists them."""
    group_size: PositiveInt = 1
    """Completions a prompt."""
    advantage: AdvantageBlock = AdvantageBlock()
    """Rewards to advantages."""
    loss: PolicyLossBlock = PolicyLossBlock()
    """The policy loss."""
    kl: KLBlock = KLBlock()
    """Distance to the reference."""
    correction: CorrectionBlock = CorrectionBlock()
    """Off-policy correction between engine and trainer."""
    groups: GroupBlock = GroupBlock()
    """What is done with groups and batches before the loss."""
    critic: CriticBlock = CriticBlock()
    """PPO's value model."""
    preference: PreferenceBlock = PreferenceBlock()
    """Preference and reward-model losses."""

    @field_validator("name")
    @classmethod
    def _is_in_the_table(cls, name: str) -> str:
        if name not in ALGORITHMS:
            remedy = did_you_mean(name, list(ALGORITHMS))
            raise ValueError(f"{name} is no algorithm ({remedy} `rlflow algorithms` lists them)")
        return name

    @property
    def learning(self) -> Learning:
        """What it learns from, and how: the row's columns."""
        return ALGORITHMS[self.name].learning

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen model scores what is trained."""
        uses = {"none": False, "kl": self.kl.coef > 0, "loss": not self.preference.reference_free}
        return uses[self.learning.reference]

    @property
    def needs_critic(self) -> bool:
        """Whether a value model learns beside the policy."""
        return self.learning.family == "online" and self.advantage.estimator == "gae"

    def conflicts(self) -> Iterator[Conflict]:
        yield from unused_options(self)
        yield from self._group_conflicts()

    def _group_conflicts(self) -> Iterator[Conflict]:
        if self.learning.family != "online" or self.group_size > 1:
            return
        if self.advantage.estimator in ("group_mean", "leave_one_out"):
            reason = (
                f"with 1 completion a prompt {self.advantage.estimator} leaves no advantage: set group_size to 2 or "
                "more, or advantage.estimator: batch_mean"
            )
            yield Conflict(("group_size", "advantage.estimator"), reason)
        elif self.advantage.scale == "group_std" and self.advantage.estimator == "batch_mean":
            reason = "1 completion has no standard deviation: set group_size to 2 or more, or advantage.scale: none"
            yield Conflict(("group_size", "advantage.scale"), reason)
        if self.groups.reward_scaling == "normalize_each":
            reason = "1 completion normalised is 0: set group_size to 2 or more, or groups.reward_scaling: sum"
            yield Conflict(("groups.reward_scaling", "group_size"), reason)
        if self.groups.require_signal:
            reason = "no group of 1 completion has rewards that differ: set group_size to 2 or more"
            yield Conflict(("groups.require_signal", "group_size"), reason)
