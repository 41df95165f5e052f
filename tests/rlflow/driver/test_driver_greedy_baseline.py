"""ReMax's greedy rollouts: one a prompt, drawn at temperature 0, scored, and trained in no way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import rlflow
from rlflow.inspection.replay import Scorer, replay
from rlflow.recipe import algorithm_of, load_recipe
from rlflow.tracking.rollouts import read_rollouts
from rlflow.types import GroupRequest, Prompt, SamplingParams
from tests.local_actors import use_local_actors

RECIPE = """
run: {{output_dir: {out}, seed: 3, steps: 1}}
model: {{path: {model}}}
algorithm: {{name: remax, group_size: 2, groups: {{count_masked: true}}}}
data: {{train: {{path: {rows}}}, prompts_per_step: 4, max_prompt_tokens: 32}}
rewards: [{{plugin: "{plugin}:vowels"}}]
rollout: {{engine: torch, max_new_tokens: 6}}
tracking: [jsonl]
"""
PLUGIN = """
def vowels(completions):
    return [sum(c in "aeiou" for c in text) for text in completions]
"""


@pytest.fixture
def directory(monkeypatch, tmp_path: Path, tiny_model_dir: Path) -> Path:
    use_local_actors(monkeypatch)
    rows, plugin, recipe = tmp_path / "rows.jsonl", tmp_path / "rewards.py", tmp_path / "recipe.yaml"
    rows.write_text("".join(json.dumps({"prompt": f"Say {word}."}) + "\n" for word in "abcd"))
    plugin.write_text(PLUGIN)
    recipe.write_text(RECIPE.format(out=tmp_path / "run", model=tiny_model_dir, rows=rows, plugin=plugin))
    rlflow.run(recipe)
    return tmp_path / "run"


def test_the_last_rollout_of_a_group_is_greedy_and_only_its_reward_counts(directory: Path, tiny_model_dir: Path):
    records = read_rollouts(directory / "rollouts" / "step_000001.parquet", tokens=True)
    assert [record.state for record in records] == ["trained", "trained", "baseline"] * 4
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    for record in records[2::3]:
        ids = torch.tensor([[*record.prompt_token_ids, *record.token_ids]])
        with torch.no_grad():
            best = model(ids).logits[0, len(record.prompt_token_ids) - 1 : -1].argmax(dim=1)
        assert best.tolist() == record.token_ids.tolist()
    for group in (records[i : i + 3] for i in range(0, 12, 3)):
        assert [r.advantage for r in group[:2]] == pytest.approx([r.reward - group[2].reward for r in group[:2]])
    line = json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])
    trained = [record for record in records if record.state == "trained"]
    assert line["reward/mean"] == pytest.approx(np.mean([record.reward for record in trained]))
    assert line["reward/greedy_mean"] == pytest.approx(np.mean([record.reward for record in records[2::3]]))
    assert line["completion/mean_tokens"] == pytest.approx(np.mean([record.num_tokens for record in trained]))


def test_rewards_and_advantages_of_stored_rollouts_are_those_of_the_run(directory: Path):
    (recipe,) = load_recipe(directory / "recipe.yaml")
    records = read_rollouts(directory / "rollouts" / "step_000001.parquet", tokens=True)
    result = replay(records, Scorer(recipe.rewards, recipe.reward_server, recipe.online, recipe.rollout.max_new_tokens))
    assert [o.advantage for o in result.outcomes] == pytest.approx([record.advantage for record in records])


def test_one_more_rollout_is_asked_for_than_is_trained():
    assert algorithm_of("remax").rollouts_per_prompt == 2
    assert algorithm_of("grpo").rollouts_per_prompt == 8


def test_only_the_last_rollouts_of_a_request_are_greedy_and_all_else_stays_as_it_was():
    params = SamplingParams(max_new_tokens=5, temperature=0.7, stop_token_ids=(1,))
    request = GroupRequest(0, Prompt("p", np.zeros(1, np.int32), (), {}), (1, 2, 3), params, num_greedy=1)
    assert [request.params_of(index).temperature for index in range(3)] == [0.7, 0.7, 0.0]
    assert request.params_of(2).stop_token_ids == (1,)
