"""The kinds of `algorithm.advantage`: rewards to advantages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from rlflow.recipe.block import (
    Block,
    Conflict,
    Fraction,
    PositiveFloat,
    malformed_function,
)


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
