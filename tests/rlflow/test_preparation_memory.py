"""What a LoRA's start needs before the actors start: counted by hand, and a part of the plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlflow.memory import shape_of, with_adapter
from rlflow.plan_text import render
from rlflow.planning import make_plans
from rlflow.preparation_memory import preparation_bytes
from rlflow.recipe import Recipe, load_recipe

LAYERS, HIDDEN, MLP, QUERIES, KEYS, VOCABULARY = 8, 1024, 4096, 1024, 512, 32_000
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": VOCABULARY,
}


def recipe_of(path: Path, start: str | bool) -> Recipe:
    given = {
        "algorithm": {"name": "sft"},
        "model": {"path": str(path), "adapter": {"peft": {"peft_type": "LORA", "r": 4, "init_lora_weights": start}}},
        "data": {"train": {"path": "rows.jsonl"}},
        "run": {"steps": 1},
    }
    return load_recipe(given)[0]


@pytest.mark.parametrize(
    ("start", "beside_weights"),
    [
        (True, None),
        ("pissa", 6 * HIDDEN * MLP * 4),
        # What the layers read: queries, keys, values, gate and up the hidden state, the others what is before them.
        ("corda", 2 * LAYERS * (5 * HIDDEN**2 + QUERIES**2 + MLP**2) * 4 + 6 * MLP**2 * 4),
    ],
)
def test_the_start_of_an_adapter_takes_what_its_method_keeps(
    tiny_model_dir: Path, start: str | bool, beside_weights: int | None
):
    recipe = recipe_of(tiny_model_dir, start)
    assert recipe.model.adapter is not None
    shape = with_adapter(shape_of(CONFIG), recipe.model.adapter)
    weights = shape.parameters * 4 + 2 * (shape.adapter or 0) * 4
    expected = 0 if beside_weights is None else weights + beside_weights
    assert preparation_bytes(recipe, shape) == expected


def test_the_plan_counts_and_says_it(tiny_model_dir: Path):
    plans = {start: make_plans([recipe_of(tiny_model_dir, start)])[0] for start in (True, "lora_ga", "eva")}
    assert "before the actors start" not in render(plans[True])
    assert "; its start, lora_ga, is computed before the actors start, in some 0.0" in render(plans["lora_ga"])
    large = {
        start: replace(plan, shape=with_adapter(shape_of(CONFIG), plan.recipe.model.adapter))
        for start, plan in plans.items()
        if plan.recipe.model.adapter is not None
    }
    assert large["lora_ga"].host_bytes > large["eva"].host_bytes > large[True].host_bytes
