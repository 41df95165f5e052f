"""The functions of the user's own that a recipe names beside its rewards and data, and what each is called with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rlflow.recipe.advantage_blocks import OwnAdvantageBlock
from rlflow.recipe.algorithm import OnlineBlock, PairBlock
from rlflow.recipe.policy_loss_blocks import OwnLossBlock
from rlflow.recipe.preference_blocks import OwnPairBlock
from rlflow.recipe.schema import Recipe
from rlflow.recipe.trainer_blocks import OwnOptimizerBlock

OF_LOSS = (
    "ratio",
    "log_ratio",
    "logprobs",
    "old_logprobs",
    "engine_logprobs",
    "ref_logprobs",
    "advantages",
    "sequence_ids",
    "num_sequences",
)
OF_ADVANTAGE = ("rewards", "group_of", "lengths", "columns")
OF_PAIR = ("chosen", "rejected", "beta")
OF_OPTIMIZER = ("parameters", "named_parameters")


@dataclass(frozen=True, slots=True)
class OwnFunction:
    """One of them."""

    plugin: str
    args: Mapping[str, Any]
    offered: tuple[str, ...] = ()
    """Names of what it may take."""
    num_positional: int = 0
    """Arguments that it is given by position; a class is made without them."""


class _Named(Protocol):
    @property
    def plugin(self) -> str: ...
    @property
    def args(self) -> dict[str, Any]: ...


def own_functions(recipe: Recipe) -> dict[str, OwnFunction]:
    """By dotted key of the block that names it."""
    found: dict[str, OwnFunction] = {}

    def add(key: str, block: _Named, offered: tuple[str, ...] = (), num_positional: int = 0) -> None:
        found[key] = OwnFunction(block.plugin, block.args, offered, num_positional)

    algorithm = recipe.algorithm
    if isinstance(algorithm, OnlineBlock) and isinstance(algorithm.loss, OwnLossBlock):
        add("algorithm.loss", algorithm.loss, OF_LOSS)
    if isinstance(algorithm, OnlineBlock) and isinstance(algorithm.advantage, OwnAdvantageBlock):
        add("algorithm.advantage", algorithm.advantage, OF_ADVANTAGE)
    if isinstance(algorithm, PairBlock) and isinstance(algorithm.preference, OwnPairBlock):
        add("algorithm.preference", algorithm.preference, OF_PAIR)
    if isinstance(recipe.trainer.optimizer, OwnOptimizerBlock):
        add("trainer.optimizer", recipe.trainer.optimizer, OF_OPTIMIZER)
    for index, metric in enumerate(recipe.metrics):
        add(f"metrics.{index}", metric, num_positional=1)
    for index, callback in enumerate(recipe.callbacks):
        add(f"callbacks.{index}", callback, num_positional=2)
    return found
