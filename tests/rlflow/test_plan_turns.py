"""The plan of rollouts of several turns."""

from __future__ import annotations

from pathlib import Path

from rlflow.plan_text import render
from rlflow.planning import make_plans
from rlflow.recipe import load_recipe

RECIPE = """\
algorithm: {name: grpo, group_size: 2}
model:
  architecture: {model_type: llama, hidden_size: 8, intermediate_size: 16, num_hidden_layers: 2,
    num_attention_heads: 2, num_key_value_heads: 1}
  characters: abcd
data: {train: {generator: arithmetic}, prompts_per_step: 4, max_prompt_tokens: 10}
rewards: [{name: environment}]
environment: {plugin: "game.py:Game", max_turns: 3, max_tokens: 50}
rollout: {max_new_tokens: 6}
run: {steps: 10, output_dir: out}
"""


def test_the_plan_says_how_long_an_episode_may_be_and_counts_with_it(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    (plan,) = make_plans(load_recipe(path))
    (line,) = [line for line in render(plan).splitlines() if line.startswith("turns")]
    assert line.endswith("game.py:Game, at most 3 turns of 6 tokens, 50 in all")
    assert plan.max_tokens == 4 * 2 * (10 + 50)
