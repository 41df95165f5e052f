"""A key that other frameworks have and recipes have not."""

from __future__ import annotations

from rlflow.recipe.foreign.rows import Row, Table, unneeded
from rlflow.recipe.foreign.swift import MEGATRON_SWIFT
from rlflow.recipe.foreign.trl import TABLES
from rlflow.recipe.foreign.verl import PPO

_ORDER: dict[str, tuple[Table, ...]] = {
    "online": (TABLES["grpo"], MEGATRON_SWIFT, TABLES["rloo"], TABLES["sft"], TABLES["dpo"]),
    "sft": (TABLES["sft"], MEGATRON_SWIFT, TABLES["grpo"], TABLES["dpo"]),
    "preference": (TABLES["dpo"], TABLES["kto"], TABLES["reward"], MEGATRON_SWIFT, TABLES["grpo"]),
}


_BLOCKS: Table = dict.fromkeys(
    ("actor_rollout_ref", "custom_reward_function"),
    unneeded("is verl's: rlflow convert -- python -m verl.trainer.main_ppo --config-path DIRECTORY --config-name FILE"),
)


def foreign_row(name: str, family: str) -> Row | None:
    """What a name of TRL's, ms-swift's or verl's stands for in a recipe of a family of algorithms.

    verl's keys are long; the last part of one is enough, the policy's before the critic's.
    """
    for table in _ORDER[family]:
        if name in table:
            return table[name]
    if (row := _BLOCKS.get(name) or PPO.get(name)) is not None:
        return row
    return next((row for key, row in PPO.items() if key.endswith(f".{name}")), None)
