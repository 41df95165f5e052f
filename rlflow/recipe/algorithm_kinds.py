"""What a recipe's algorithm has: a class for each objective, since rows of one objective have the same blocks."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field, field_validator

from rlflow.recipe.advantage_blocks import Advantage, BaselineBlock
from rlflow.recipe.algorithm_blocks import BoundedWeightBlock, Correction, CriticBlock, GroupBlock, KLBlock
from rlflow.recipe.block import Block, Conflict, PositiveInt
from rlflow.recipe.distill_blocks import Distill, DivergenceDistillBlock, NoDistillBlock
from rlflow.recipe.mixture_blocks import MixtureBlock
from rlflow.recipe.policy_loss_blocks import ClipBlock, CovarianceBlock, KLCovBlock, LossBlock, PolicyLoss, Reduction
from rlflow.recipe.preference_blocks import KTOLossBlock, PairLoss, RewardLossBlock, SigmoidBlock
from rlflow.recipe.presets import ALGORITHMS, Learning
from rlflow.recipe.problems import did_you_mean
from rlflow.recipe.rows.distillation import FROM_ANSWERS
from rlflow.recipe.sample_blocks import KeepBlock
from rlflow.recipe.sequence_blocks import (
    ClassesBlock,
    EmbeddingLoss,
    InfoNCEBlock,
    PlainRankingBlock,
    Problem,
    RankingLoss,
    YesNoBlock,
)


class AlgorithmBlock(Block):
    """What every algorithm has."""

    name: str
    """A row of the table: `rlflow algorithms` lists them."""

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
        return False

    @property
    def couples_sequences(self) -> bool:
        """Whether the loss compares sequences of the whole step, wherever they are computed."""
        return False

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher scores what is trained."""
        return False

    @property
    def reduction(self) -> Reduction:
        """What the token weights of a batch add up to."""
        return "token"

    @property
    def num_mini_batches(self) -> int:
        """What a step's samples are split into, for an optimizer update each."""
        return 1

    @property
    def num_updates(self) -> int:
        """Optimizer updates a step."""
        return self.num_mini_batches


class OnlineBlock(AlgorithmBlock):
    group_size: PositiveInt = 1
    """Completions a prompt."""
    advantage: Advantage = Field(BaselineBlock(), discriminator="estimator")
    """Rewards to advantages."""
    loss: PolicyLoss = Field(ClipBlock(), discriminator="kind")
    """The policy loss."""
    kl: KLBlock = KLBlock(coef=0.0)
    """Distance to the reference."""
    correction: Correction = Field(BoundedWeightBlock(), discriminator="mode")
    """Off-policy correction between engine and trainer."""
    groups: GroupBlock = GroupBlock()
    """What is done with groups and batches before the loss."""
    mixture: MixtureBlock | None = None
    """Demonstrations beside the rollouts, which `demonstrations` names; none when absent."""
    critic: CriticBlock | None = None
    """PPO's value model; there is one with advantage.estimator gae alone."""
    distill: Distill = Field(NoDistillBlock(), discriminator="kind")
    """What is learned from a teacher."""

    @property
    def learning(self) -> Learning:
        row = ALGORITHMS[self.name].learning
        is_offline = isinstance(self.distill, DivergenceDistillBlock) and self.distill.on_policy == 0
        return FROM_ANSWERS if is_offline else row

    @property
    def needs_teacher(self) -> bool:
        return self.distill.needs_teacher

    @property
    def rollouts_per_prompt(self) -> int:
        """Completions a prompt that are generated and scored, those that are not trained among them."""
        return self.group_size + self.advantage.num_greedy

    @property
    def needs_policy_logprobs(self) -> bool:
        """Whether the policy's logprobs of before the update are needed: by a KL, or by a choice of tokens."""
        return self.kl.needs_policy_logprobs or isinstance(self.loss, CovarianceBlock)

    @property
    def needs_reference(self) -> bool:
        return self.kl.coef > 0

    @property
    def reduction(self) -> Reduction:
        return self.loss.reduction

    @property
    def num_mini_batches(self) -> int:
        return self.groups.updates_per_step

    @property
    def num_updates(self) -> int:
        return self.num_mini_batches * self.groups.epochs_per_step

    def conflicts(self) -> Iterator[Conflict]:
        estimator = self.advantage.estimator
        if (self.critic is None) == (estimator == "gae"):
            reason = f"belongs to advantage.estimator gae, not {estimator}: remove it, or set it to null"
            if self.critic is None:
                reason = "is what advantage.estimator gae takes its values from: give one"
            yield Conflict(("critic", "advantage.estimator"), reason)
        if self.mixture is not None and self.critic is not None:
            reason = "has demonstrations, and a critic has no values of them: take another advantage.estimator than gae"
            yield Conflict(("mixture", "critic"), reason)
        if self.mixture is not None and isinstance(self.distill, DivergenceDistillBlock):
            reason = "has demonstrations, which the teacher does not score: remove it, or set distill.on_policy below 1"
            yield Conflict(("mixture", "distill.kind"), f"{reason} to learn from the data's answers")
        if isinstance(self.loss, KLCovBlock) and self.num_updates == 1:
            reason = "penalises how far later updates of a step move: set groups.updates_per_step to 2 or more"
            yield Conflict(("loss.kind", "groups.updates_per_step"), reason)
        if isinstance(self.advantage, BaselineBlock) and self.advantage.scale == "group_mean":
            yield from self._negative_rewards()
        if self.group_size > 1:
            return
        if estimator in ("group_mean", "leave_one_out", "length_weighted_mean"):
            reason = (
                f"with 1 completion a prompt {estimator} leaves no advantage: set group_size to 2 or more, or "
                "advantage.estimator: batch_mean"
            )
            yield Conflict(("group_size", "advantage.estimator"), reason)
        elif isinstance(self.advantage, BaselineBlock) and self.advantage.scale == "group_std":
            reason = "1 completion has no standard deviation: set group_size to 2 or more, or advantage.scale: none"
            yield Conflict(("group_size", "advantage.scale"), reason)
        if self.groups.reward_scaling == "normalize_each":
            reason = "1 completion normalised is 0: set group_size to 2 or more, or groups.reward_scaling: sum"
            yield Conflict(("groups.reward_scaling", "group_size"), reason)
        if self.groups.require_signal:
            reason = "no group of 1 completion has rewards that differ: set group_size to 2 or more"
            yield Conflict(("groups.require_signal", "group_size"), reason)

    def _negative_rewards(self) -> Iterator[Conflict]:
        """What takes from the rewards, whose group's mean the advantage is divided by."""
        reason = "can make rewards negative, and advantage.scale group_mean divides by their mean"
        if self.kl.coef and self.kl.placement == "reward":
            yield Conflict(("kl.placement", "advantage.scale"), f"reward {reason}: set kl.placement: loss")
        if self.groups.overlong_buffer:
            yield Conflict(("groups.overlong_buffer", "advantage.scale"), f"{reason}: remove it")
        if self.groups.reward_scaling != "sum":
            yield Conflict(("groups.reward_scaling", "advantage.scale"), f"{reason}: set it to sum")


class SampleBlock(AlgorithmBlock):
    group_size: PositiveInt = 1
    """Answers a prompt."""
    keep: KeepBlock = KeepBlock()
    """What the stages behind it learn from."""

    @property
    def rollouts_per_prompt(self) -> int:
        """Answers a prompt, all of which are scored."""
        return self.group_size


class SFTBlock(AlgorithmBlock):
    loss: LossBlock = LossBlock()
    """Cross-entropy."""

    @property
    def reduction(self) -> Reduction:
        return self.loss.reduction


class PairBlock(AlgorithmBlock):
    loss: LossBlock = LossBlock()
    """The likelihood of the chosen answers, where preference.sft_coef weighs it."""
    preference: PairLoss = Field(SigmoidBlock(), discriminator="loss")
    """The loss of a pair."""

    @property
    def needs_reference(self) -> bool:
        return not self.preference.reference_free

    @property
    def reduction(self) -> Reduction:
        return self.loss.reduction

    def conflicts(self) -> Iterator[Conflict]:
        switched_off = "sft_coef" in self.preference.model_fields_set
        if self.loss != LossBlock() and not (self.preference.sft_coef or switched_off):
            reason = "has no effect without preference.sft_coef: remove it, or set it to token"
            yield Conflict(("loss.reduction", "preference.sft_coef"), reason)


class KTOBlock(AlgorithmBlock):
    preference: KTOLossBlock = KTOLossBlock()
    """The loss of a judged answer."""

    @property
    def needs_reference(self) -> bool:
        return True


class RewardModelBlock(AlgorithmBlock):
    preference: RewardLossBlock = RewardLossBlock()
    """The loss of a pair."""


class ClassificationBlock(AlgorithmBlock):
    classification: Problem = Field(ClassesBlock(), discriminator="problem")
    """What is said of a text."""


class EmbeddingBlock(AlgorithmBlock):
    embedding: EmbeddingLoss = Field(InfoNCEBlock(), discriminator="loss")
    """What texts near each other are."""

    @property
    def couples_sequences(self) -> bool:
        return True


class RerankerBlock(AlgorithmBlock):
    reranking: RankingLoss = Field(PlainRankingBlock(), discriminator="loss")
    """What a query's documents are compared by."""

    @property
    def couples_sequences(self) -> bool:
        return self.reranking.loss != "pointwise"


class GenerativeRerankerBlock(RerankerBlock):
    answers: YesNoBlock = YesNoBlock()
    """What the model is asked, and what its answer may be."""


class UnknownBlock(AlgorithmBlock, extra="ignore"):
    """An algorithm without a name that the table has, which is what is to be said of it."""
