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
