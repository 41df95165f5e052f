"""In which form rollout workers get an adapter, as it is where the engine takes it so, else merged; and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlflow.policy_weights import sends_merged, weight_transport
from rlflow.recipe import load_recipe
from rlflow.recipe.problems import RecipeError


@pytest.mark.parametrize(
    ("base", "engine", "adapter", "merged"),
    [
        ("dense", "vllm", {"rank": 4}, False),
        ("experts", "vllm", {"rank": 4}, True),
        ("experts", "torch", {"rank": 4}, False),
        ("experts", "vllm", {"target_modules": ["gate_proj", "up_proj"]}, True),
        ("experts", "vllm", {"target_modules": ["q_proj", "v_proj"]}, False),
        ("dense", "vllm", {"target_modules": ["gate_proj", "up_proj"]}, False),
        ("org/elsewhere", "vllm", {"target_modules": ["q_proj"]}, False),
    ],
)
def test_vllm_gets_what_is_trained_on_experts_as_whole_weights(
    tiny_model_dir: Path, tiny_moe_dir: Path, base: str, engine: str, adapter: dict[str, Any], merged: bool
):
    path = {"dense": str(tiny_model_dir), "experts": str(tiny_moe_dir)}.get(base, base)
    given = {
        "algorithm": {"name": "grpo"},
        "model": {"path": path, "adapter": adapter},
        "data": {"train": {"path": "rows.jsonl"}},
        "rewards": [{"name": "exact_match"}],
        "rollout": {"engine": engine},
        "run": {"steps": 1},
    }
    (recipe,) = load_recipe(given)
    assert sends_merged(recipe) == merged


def recipe_with(**overrides: Any) -> Any:
    given = {
        "algorithm": {"name": "grpo"},
        "model": {"path": "org/elsewhere"},
        "data": {"train": {"path": "rows.jsonl"}},
        "rewards": [{"name": "exact_match"}],
        "run": {"steps": 1},
    }
    (recipe,) = load_recipe(given, {key.replace("__", "."): value for key, value in overrides.items()})
    return recipe


SHARED = {"trainer__gpus_per_worker": 0.5, "rollout__gpus_per_worker": 0.5}
APART = {"trainer__gpus_per_worker": 1, "rollout__gpus_per_worker": 1}


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({}, "objects"),
        ({"rollout__at_update__transport": "ipc"}, "ipc"),
        ({"rollout__gpus_per_worker": 1}, "objects"),
        (SHARED, "objects"),
        ({**SHARED, "rollout__at_update__transport": "objects"}, "objects"),
        ({**SHARED, "model__adapter": {"rank": 4}}, "objects"),
        ({**SHARED, "rollout__at_update__running": "wait"}, "objects"),
        (APART, "objects"),
        ({**APART, "rollout__at_update__transport": "collective"}, "collective"),
        ({**APART, "rollout__gpus_per_worker": 2, "rollout__tensor_parallel_size": 2}, "objects"),
    ],
)
def test_weights_travel_by_where_trainer_and_workers_are(overrides: dict[str, Any], name: str):
    transport = weight_transport(recipe_with(**overrides))
    assert transport.name == name and transport.reason


@pytest.mark.parametrize(
    ("overrides", "fits"),
    [
        (SHARED, "ipc would fit"),
        (APART, "collective would fit"),
        ({**APART, "trainer__workers": 2, "rollout__workers": 3}, "collective would fit"),
        ({**APART, "rollout__gpus_per_worker": 0.5}, "workers have shares of other GPUs"),
    ],
)
def test_what_has_not_run_on_a_gpu_is_named_and_not_chosen(overrides: dict[str, Any], fits: str):
    transport = weight_transport(recipe_with(**overrides))
    assert transport.name == "objects" and fits in transport.reason


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"rollout__at_update__running": "wait"}, "the trainer would wait for completions under way"),
        ({**APART, "rollout__gpus_per_worker": 2, "rollout__tensor_parallel_size": 2}, "its worker's process"),
        ({"rollout__engine": "http", "rollout_server__urls": ["http://10.0.0.5:8000"]}, "read new weights from files"),
    ],
)
def test_a_transport_that_could_not_work_is_an_error_of_the_recipe(overrides: dict[str, Any], says: str):
    with pytest.raises(RecipeError, match=says):
        recipe_with(**overrides, rollout__at_update__transport="ipc")
