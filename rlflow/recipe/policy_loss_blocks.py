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


class GMPOBlock(PolicyLossBlock):
    kind: Literal["gmpo"] = "gmpo"
    """The geometric mean of clipped token ratios."""
    ratio: Literal["token"] = "token"
    """Of a token: the loss takes the mean itself."""
    clip_low: NonNegativeFloat = 0.4
    """Log-ratios below -clip_low are clipped."""
    clip_high: NonNegativeFloat = 0.4
    """Log-ratios above clip_high are clipped."""


class DPPOBlock(PolicyLossBlock):
    kind: Literal["dppo"] = "dppo"
    """A mask by the policies' divergence at the token instead of a clip of the ratio."""
    ratio: Literal["token"] = "token"
    """Of a token, as the divergence is."""
    divergence: Literal["tv", "kl"] = "tv"
    """Total variation, or KL, of the sampled token against all others."""
    bound_low: PositiveFloat = 0.15
    """Tokens of negative advantage that became less probable are dropped beyond this divergence; with kl the paper has
    0.05."""
    bound_high: PositiveFloat = 0.15
    """Tokens of positive advantage that became more probable are dropped beyond it."""
    max_weight: PositiveFloat = 20.0
    """Largest ratio that a token's gradient is weighed with."""


class CovarianceBlock(PolicyLossBlock):
    """What losses have that choose tokens by the covariance of logprob and advantage."""

    share: Annotated[float, Field(strict=True, gt=0, le=1)]
    """Share of the update's tokens that are chosen; one at least."""


class ClipCovBlock(CovarianceBlock):
    kind: Literal["clip_cov"] = "clip_cov"
    """A clip, and no gradient of some tokens whose covariance is high."""
    share: Annotated[float, Field(strict=True, gt=0, le=1)] = 2e-4
    """Share of the update's tokens that are left out, drawn among those between the two bounds; one at least."""
    covariance_low: Number = 1.0
    """Tokens are left out whose covariance is above."""
    covariance_high: Number = 5.0
    """And below."""
    clip_low: NonNegativeFloat = 0.2
    """Ratios below 1 - clip_low are clipped; 1 is no lower bound."""
    clip_high: NonNegativeFloat = 0.2
    """Ratios above 1 + clip_high are clipped."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.covariance_low >= self.covariance_high:
            reason = f"{self.covariance_low:g} is not below covariance_high ({self.covariance_high:g})"
            yield Conflict(("covariance_low", "covariance_high"), f"{reason}: no covariance is within")


class KLCovBlock(CovarianceBlock):
    kind: Literal["kl_cov"] = "kl_cov"
    """No clip, and a KL on the tokens of the largest covariances."""
    share: Annotated[float, Field(strict=True, gt=0, le=1)] = 2e-3
    """Share of the update's tokens that bear the KL, those of the largest covariances; one at least."""
    coef: PositiveFloat = 1.0
    """Weight of their KL to the policy of before the first update."""


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


PolicyLoss = ClipBlock | CISPOBlock | SAPOBlock | GMPOBlock | DPPOBlock | ClipCovBlock | KLCovBlock | OwnLossBlock
