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
TOKENS = 8 * 512
"""Of a forward pass."""
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
        # Logits and their log-softmax; of its largest layer four hidden states, gate, up and their product.
        ("eva", TOKENS * (2 * VOCABULARY + 4 * HIDDEN + 3 * MLP) * 4),
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


def test_eva_of_few_words_takes_what_python_makes_of_the_widest_input(tiny_model_dir: Path):
    recipe = recipe_of(tiny_model_dir, "eva")
    assert recipe.model.adapter is not None
    of_few, of_fewer = (
        preparation_bytes(recipe, with_adapter(shape_of(CONFIG | {"vocab_size": words}), recipe.model.adapter))
        for words in (2_000, 1_000)
    )
    # Embeddings and head alone are smaller: each number of an input is 48 bytes whatever the vocabulary is.
    assert of_few - of_fewer == 2 * 1_000 * HIDDEN * 4
    weights = shape_of(CONFIG | {"vocab_size": 1_000}).parameters * 4
    assert of_fewer > weights + TOKENS * MLP * 48


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
