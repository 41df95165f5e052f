"""The kinds of `algorithm.preference`: the loss of a pair, or of a judged answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from rlflow.recipe.block import (
    Block,
    Conflict,
    NonNegativeFloat,
    PositiveFloat,
    malformed_function,
)

Smoothing = Annotated[float, Field(strict=True, ge=0, lt=0.5)]


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


Divergence = Literal["reverse_kl", "forward_kl", "js"]


class DivergenceBlock(PairLossBlock):
    """What losses have that compare the two answers' scores, so that other divergences can take the KL's place."""

    divergence: Divergence = "reverse_kl"
    """From the reference: DPO's KL, the forward KL, or Jensen and Shannon's divergence (f-DPO, arXiv 2309.16240)."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.reference_free and self.divergence != "reverse_kl":
            reason = f"{self.divergence} is from a reference, and there is none: remove it, or reference_free"
            yield Conflict(("divergence", "reference_free"), reason)


class SigmoidBlock(DivergenceBlock):
    loss: Literal["sigmoid"] = "sigmoid"
    """DPO's."""
    label_smoothing: Smoothing = 0.0
    """Probability that a label is flipped."""
    gamma: NonNegativeFloat = 0.0
    """Target margin (SimPO)."""


class RobustBlock(DivergenceBlock):
    loss: Literal["robust"]
    """DPO's, unbiased when some labels are flipped."""
    label_smoothing: Smoothing = 0.0
    """Probability that a label is flipped."""


class RankedBlock(PairLossBlock):
    loss: Literal["aot", "aot_unpaired"]
    """Against what has the same rank in the batch."""
    label_smoothing: Smoothing = 0.0
    """Probability that a label is flipped."""


class EXOBlock(DivergenceBlock):
    loss: Literal["exo_pair"]
    """See docs/algorithms.md."""
    label_smoothing: Annotated[float, Field(strict=True, gt=0, lt=0.5)] = 1e-3
    """Its epsilon."""


class MarginBlock(DivergenceBlock):
    loss: Literal["hinge", "ipo", "discopop"]
    """Of the margin between the two answers, see docs/algorithms.md."""


class PlainPairBlock(PairLossBlock):
    loss: Literal["nca_pair", "bco_pair", "sppo", "apo_zero", "apo_down"]
    """Of each answer's own score, see docs/algorithms.md."""


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


PairLoss = SigmoidBlock | RobustBlock | RankedBlock | EXOBlock | MarginBlock | PlainPairBlock | ORPOBlock | OwnPairBlock


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
