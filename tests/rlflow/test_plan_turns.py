"""The plan of rollouts of several turns."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlflow.plan_text import render
from rlflow.planning import Plan, make_plans
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


def plan_of(directory: Path, *overrides: str) -> Plan:
    path = directory / "recipe.yaml"
    path.write_text(RECIPE)
    return make_plans(load_recipe(path, overrides))[0]


@pytest.mark.parametrize(
    ("overrides", "processes"),
    [
        ([], 4 * 2),
        (["rollout.workers=2"], 2 * 2),
        (["run.max_staleness=1"], 2 * 4 * 2),
        (["rollout.max_num_seqs=3"], 3),
        # How many prompts an evaluation has is not known here.
        (["evaluation.data.generator=arithmetic", "evaluation.every=5", "rollout.max_num_seqs=20"], 20),
    ],
)
def test_the_plan_counts_a_process_for_each_episode_under_way(tmp_path: Path, overrides, processes):
    plan = plan_of(tmp_path, *overrides)
    assert f"at most {processes} processes of environments a worker, each of which may take 0.9 GiB" in render(plan)
    (rollout,) = [planned for planned in plan.roles if planned.role.name == "rollout"]
    assert rollout.parts is not None
    assert rollout.parts["environments"] == 2**26 + processes * 2**22


def test_environments_are_in_the_hosts_memory_whatever_the_engine_is_on(tmp_path: Path):
    plan = plan_of(tmp_path, "rollout.gpus_per_worker=1", "rollout.engine=torch")
    (rollout,) = [planned for planned in plan.roles if planned.role.name == "rollout"]
    assert rollout.parts is not None
    of_environments = rollout.parts["environments"]
    assert rollout.gpu_bytes_each == rollout.bytes_each - of_environments
    assert rollout.host_bytes_each == 2**29 + of_environments
