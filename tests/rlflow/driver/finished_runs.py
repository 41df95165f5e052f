"""A new model of some thousand parameters to run with, and what the directory of a run says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Protocol

from safetensors.numpy import load_file

from rlflow.checkpoint import saved_steps

NEW_MODEL = {
    "characters": "0123456789+=",
    "architecture": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 16,
        "intermediate_size": 32,
        "head_dim": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    },
}


class RunRecipe(Protocol):
    """The fixture ``run_recipe``."""

    def __call__(
        self, recipe: dict[str, Any], name: str = "run", *, resume: bool = False, **overrides: Any
    ) -> Path: ...


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    """Those of each step, from what the policy was before the first."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def steps_of(directory: Path) -> list[int]:
    return [line["step"] for line in metrics_of(directory)]


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs left the same numbers, to the bit."""
    weights = [load_file(directory / "final" / "model.safetensors") for directory in (one, other)]
    return all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def as_if_killed_after(directory: Path, step: int) -> None:
    """Neither ``final/`` nor the checkpoints of later steps were written."""
    shutil.rmtree(directory / "final")
    for later in saved_steps(directory / "checkpoints"):
        if later > step:
            shutil.rmtree(directory / "checkpoints" / f"step_{later:06d}")
