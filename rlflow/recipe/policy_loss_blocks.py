"""The kinds of `algorithm.loss` of online rows: the loss of a token, and what weighs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from rlflow.recipe.block import (
    Block,
    Conflict,
    NonNegativeFloat,
    Number,
    PositiveFloat,
    malformed_function,
)

Reduction = Literal["token", "sequence", "prompt", "fixed_length"]


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
