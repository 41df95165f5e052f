"""In which form rollout workers get an adapter: as it is where the engine takes it so, else merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlflow.policy_weights import sends_merged
from rlflow.recipe import load_recipe


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
