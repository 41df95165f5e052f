"""An unknown key that is another framework's is told what it is here."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlflow.recipe import RecipeError, load_recipe
from rlflow.recipe.foreign.names import foreign_row

RECIPE = """\
algorithm: {name: NAME}
model: {path: o/m}
data: {train: {path: o/d}}
run: {steps: 1}
"""
REWARDS = "rewards: [{name: format}]\n"


def said(tmp_path: Path, name: str, line: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("NAME", name) + (REWARDS if name == "grpo" else "") + line)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "line", "remedy"),
    [
        ("grpo", "beta: 0.04", "did you mean algorithm.kl.coef?"),
        ("dpo", "beta: 0.04", "algorithm.preference"),
        ("grpo", "sleep_level: 1", "nothing is put to sleep"),
        ("grpo", "warmup_ratio: 0.05", "did you mean trainer.warmup_steps? It counts steps"),
        ("sft", "attn_impl: flash_attn", "see model.dtype"),
        ("sft", "logging_steps: 5", "every step is logged"),
        ("sft", "packing: true", "did you mean trainer.tokens_per_micro_batch?"),
        ("grpo", "num_generations: 8", "did you mean algorithm.group_size?"),
        ("sft", "lora_rank: 8", "did you mean model.adapter.rank?"),
        ("grpo", "actor_rollout_ref: {model: {path: m}}", "rlflow convert"),
        ("grpo", "ppo_mini_batch_size: 64", "did you mean algorithm.groups.updates_per_step?"),
        ("sft", "neftune_noise_alpha: 5", "NEFTune"),
    ],
)
def test_a_foreign_key_is_answered_with_ours(tmp_path: Path, name: str, line: str, remedy: str):
    assert remedy in said(tmp_path, name, line)


def test_a_key_of_nobody_lists_the_keys_that_there_are(tmp_path: Path):
    assert foreign_row("whatever_else", "online") is None
    assert "keys here are" in said(tmp_path, "sft", "trainer: {qqqq: 1}")
