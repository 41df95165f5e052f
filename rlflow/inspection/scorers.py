"""What stored rollouts are replayed with: the rewards and the algorithm of a recipe, or functions that are named."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlflow.data.errors import DataError
from rlflow.inspection.replay import Scorer
from rlflow.recipe import (
    OnlineBlock,
    Recipe,
    RecipeError,
    RewardBlock,
    RewardServerBlock,
    algorithm_of,
    load_recipe,
)
from rlflow.rewards.resolving import REWARDS
from rlflow.tracking.history import RECIPE
from rlflow.tracking.redact import MASK


def scorer_of(stage: Path, recipe: Path | None, functions: Sequence[str]) -> Scorer:
    """The scorer that a replay asks for.

    Args:
        stage: The directory of the rollouts.
        recipe: A recipe to take instead of the one that the stage was trained under.
        functions: Rewards by name, or ``file.py:function``, in place of a recipe's; advantages are then not computed.

    Raises:
        DataError: There is no recipe, or it has no rewards, or lacks their secrets.
        RecipeError: The recipe that was given is wrong.
    """
    if functions:
        rewards = [_block(function) for function in functions]
        return Scorer(rewards, RewardServerBlock(), algorithm_of("grpo"), max_new_tokens=1, advantages=False)
    found = _stage_of(load_recipe(recipe), stage.resolve().name) if recipe is not None else _own(stage)
    if not isinstance(found.algorithm, OnlineBlock) or not found.rewards:
        raise DataError(f"the recipe of {found.algorithm.name} has no rewards to replay: name some with --rewards")
    return Scorer(found.rewards, found.reward_server, found.online, found.rollout.max_new_tokens)


def _own(stage: Path) -> Recipe:
    path = stage / RECIPE
    remedy = "give the recipe with --recipe, or functions with --rewards"
    try:
        (recipe,) = load_recipe(path)
    except RecipeError as error:
        first = str(error).splitlines()
        reason = next((line.strip() for line in first if line.strip()), "unknown")
        raise DataError(f"{path} is no recipe of this version ({reason}): {remedy}") from error
    masked = [reward.label for reward in recipe.rewards if _is_masked(reward.args)]
    if masked:
        raise DataError(f"{path} has no secrets, and the reward {masked[0]} has one in its args: {remedy}")
    return recipe


def _stage_of(recipes: Sequence[Recipe], name: str) -> Recipe:
    """The stage of that name, or the last that has rewards."""
    named = [recipe for recipe in recipes if recipe.stage == name]
    having = [recipe for recipe in recipes if recipe.rewards]
    return (named or having or list(recipes))[-1]


def _block(function: str) -> RewardBlock:
    try:
        if function in REWARDS:
            return RewardBlock.model_validate({"name": function})
        if ".py:" in function:
            file, _, attribute = function.rpartition(":")
            return RewardBlock.model_validate({"plugin": f"{Path(os.path.expanduser(file)).resolve()}:{attribute}"})
    except ValidationError as error:
        raise DataError(f"--rewards {function}: {error.errors()[0]['msg']}") from error
    raise DataError(f"--rewards {function}: write file.py:function, or one of {', '.join(REWARDS)}")


def _is_masked(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_is_masked(one) for one in value.values())
    if isinstance(value, list):
        return any(_is_masked(one) for one in value)
    return isinstance(value, str) and MASK in value
