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
    clip: PositiveFloat | None = None
    """Largest size of an advantage: cut to within -clip and clip after everything else."""
    ddof: Literal[0, 1] = 1
    """Delta degrees of freedom of the standard deviations of scale, whiten and groups.reward_scaling."""
    eps: PositiveFloat = 1e-4
    """Added to the standard deviations of scale and groups.reward_scaling."""

    @property
    def num_greedy(self) -> int:
        """Rollouts a group that are drawn greedily, for their reward alone."""
        return 0


class BaselineBlock(AdvantageBlock):
    estimator: Literal["group_mean", "leave_one_out", "batch_mean", "length_weighted_mean", "greedy"] = "group_mean"
    """What is subtracted from the reward: the group's mean, the mean of the others (RLOO), the batch's mean, the mean
    of the group weighted by its completions' lengths (OPO), or the reward of one more completion, which is greedy and
    not trained (ReMax)."""
    scale: Literal["none", "group_std", "batch_std", "group_mean"] = "none"
    """What the difference is divided by: nothing, the standard deviation of the group's or the batch's rewards, or the
    group's mean reward, of rewards of at least 0 (MaxRL)."""

    @property
    def num_greedy(self) -> int:
        return int(self.estimator == "greedy")


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
    """`file.py:function` of what it names of rewards, group_of, lengths and columns."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from malformed_function("plugin", self.plugin)


Advantage = BaselineBlock | ReturnBlock | GAEBlock | OwnAdvantageBlock
