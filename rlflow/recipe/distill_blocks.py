"""What an algorithm learns from a teacher: nothing, an advantage for each of its own tokens, or whole distributions."""

from __future__ import annotations

from typing import Literal

from rlflow.recipe.block import Block, Fraction, PositiveFloat, PositiveInt


class DistillBlock(Block):
    """What every kind has."""

    kind: str

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher scores what is trained."""
        return True


class NoDistillBlock(DistillBlock):
    kind: Literal["none"] = "none"
    """There is no teacher."""

    @property
    def needs_teacher(self) -> bool:
        return False


class AdvantageDistillBlock(DistillBlock):
    kind: Literal["advantage"] = "advantage"
    """coef times the teacher's logprob minus the policy's is added to each token's advantage (opd)."""
    coef: PositiveFloat = 1.0
    """Weight beside the advantage of the rewards."""


class DivergenceDistillBlock(DistillBlock):
    kind: Literal["divergence"] = "divergence"
    """coef times a divergence between the policy's and the teacher's next-token distributions is added to the loss of
    each token (gkd)."""
    coef: PositiveFloat = 1.0
    """Weight beside the policy loss."""
    beta: Fraction = 0.5
    """Of the generalised Jensen-Shannon divergence (arXiv 2306.13649, eq. 1): 0 is the forward KL(teacher || policy), 1
    the reverse KL(policy || teacher)."""
    on_policy: Fraction = 1.0
    """GKD's lambda: share of the rows that the policy answers itself; of the others the data's own answers are trained.
    1 is all, 0 none: then nobody generates."""
    temperature: PositiveFloat = 1.0
    """Both distributions' in the divergence; rollout.temperature is that of the policy's own answers."""
    top_k: PositiveInt | None = None
    """The teacher's so many most probable tokens, and all others together as one more; the whole vocabulary when
    absent."""


Distill = NoDistillBlock | AdvantageDistillBlock | DivergenceDistillBlock
