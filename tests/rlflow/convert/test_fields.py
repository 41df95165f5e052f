"""Every field of TRL's configurations is a key of the recipe, part of one, or said to have no counterpart."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from rlflow.recipe import Recipe
from rlflow.recipe.explain import blocks_at
from rlflow.recipe.foreign import swift, trl, verl
from rlflow.recipe.foreign.rows import Table
from rlflow.recipe.foreign.swift_sample import SAMPLE

TABLES: dict[str, Table] = {
    **trl.TABLES,
    "swift": swift.SWIFT,
    "swift sample": SAMPLE,
    "megatron": swift.MEGATRON_SWIFT,
    "verl": verl.PPO,
    "verl_sft": verl.SFT,
}


def configurations(verb: str) -> list[Any]:
    import trl
    from trl.experimental import gkd
    from trl.scripts import utils
    from trl.scripts.grpo import GRPOScriptArguments
    from trl.scripts.rloo import RLOOScriptArguments
    from trl.trainer import model_config

    of_script = {"grpo": [GRPOScriptArguments], "rloo": [RLOOScriptArguments]}.get(verb, [utils.ScriptArguments])
    named = {"reward": trl.RewardConfig, "distillation": trl.DistillationConfig, "gkd": gkd.GKDConfig}
    config = named[verb] if verb in named else getattr(trl, f"{verb.upper()}Config")
    return [config, model_config.ModelConfig, *of_script]


@pytest.mark.parametrize("verb", trl.TABLES)
def test_every_field_of_trls_configurations_is_in_the_table(verb: str):
    fields = {field.name for config in configurations(verb) for field in dataclasses.fields(config)}
    assert len(fields) > 120
    assert fields - trl.TABLES[verb].keys() == set()


@pytest.mark.parametrize("verb", trl.TABLES)
def test_the_defaults_in_the_table_are_trls(verb: str):
    ours = {name: row.default for name, row in trl.TABLES[verb].items() if row.default is not None}
    theirs = {}
    for config in configurations(verb):
        for field in dataclasses.fields(config):
            factory = field.default_factory
            theirs[field.name] = field.default if factory is dataclasses.MISSING else factory()
    theirs["bf16"] = True  # None, which TRL makes of it where there is no fp16
    theirs["loss_type"] = theirs["loss_type"][0] if verb == "dpo" else theirs.get("loss_type")
    for name, default in ours.items():
        of_trl = theirs[name]
        assert getattr(of_trl, "value", of_trl) == default, name


@pytest.mark.parametrize("name", TABLES)
def test_every_key_that_a_table_names_is_one_of_the_recipe(name: str):
    known = {""} | {
        f"{path}.{field}" for path, blocks in blocks_at().items() for block in blocks for field in block.model_fields
    }
    known |= set(Recipe.model_fields) | {key.lstrip(".") for key in known}
    free = ("data.train.columns.", "model.chat_template_kwargs.")
    wrong = {
        flag: row.key for flag, row in TABLES[name].items() if row.key not in known and not row.key.startswith(free)
    }
    assert wrong == {}
