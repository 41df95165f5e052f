"""Demonstrations beside rollouts in whole runs: which a step trains, how much they count, and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rlflow
from rlflow.data.errors import DataError
from rlflow.recipe import RecipeError, load_recipe
from tests.local_actors import use_local_actors

RECIPE = """
run: {{output_dir: {out}, seed: 3, steps: 4, save_every: 1}}
model: {{path: {model}}}
algorithm:
  name: chord
  group_size: 2
  mixture: {{mu_peak: 0.8, mu_valley: 0.0, mu_warmup_steps: 1, mu_decay_steps: 2}}
data: {{train: {{path: {rows}/prompts.jsonl}}, prompts_per_step: 2, max_prompt_tokens: 32, max_tokens: 32}}
demonstrations: {{train: {{path: {rows}/shown.jsonl}}, per_step: 3}}
rewards: [{{plugin: "{rows}/rewards.py:vowels"}}]
rollout: {{engine: torch, max_new_tokens: 6}}
trainer: {{learning_rate: 1.0e-3, tokens_per_micro_batch: 48}}
tracking: [jsonl]
"""
PLUGIN = """
def vowels(completions):
    return [sum(c in "aeiou" for c in text) for text in completions]
"""


@pytest.fixture
def write(monkeypatch, tmp_path: Path, tiny_model_dir: Path):
    use_local_actors(monkeypatch)
    prompts = [{"prompt": f"Say {word}."} for word in "abcdefgh"]
    shown = [{"prompt": f"Say {word}.", "response": word * 3} for word in "pqrst"]
    for name, rows in (("prompts", prompts), ("shown", shown)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(PLUGIN)

    def write(name: str) -> tuple[Path, Path]:
        recipe, out = tmp_path / f"{name}.yaml", tmp_path / name
        recipe.write_text(RECIPE.format(out=out, model=tiny_model_dir, rows=tmp_path))
        return recipe, out

    return write


def metrics_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]


@pytest.mark.slow
def test_a_resumed_run_ends_like_one_never_stopped_and_mu_follows_its_schedule(write):
    recipe, out = write("whole")
    rlflow.run(recipe)
    assert [line["demonstrations/mu"] for line in metrics_of(out)] == pytest.approx([0.0, 0.8, 0.4, 0.0])
    assert [line["loss/sft"] > 0 for line in metrics_of(out)[1:3]] == [True, True]
    parted, other = write("parted")
    rlflow.run(parted, overrides={"run.steps": 2})
    rlflow.run(parted, overrides={"run.steps": 4}, resume=True)
    whole, again = (load_file(path / "final" / "model.safetensors") for path in (out, other))
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.slow
def test_other_demonstrations_are_no_resumption(write, tmp_path: Path):
    recipe, _ = write("run")
    rlflow.run(recipe, overrides={"run.steps": 1})
    (tmp_path / "shown.jsonl").write_text(json.dumps({"prompt": "Say z.", "response": "z"}) + "\n")
    with pytest.raises(DataError, match=r"demonstrations\.train"):
        rlflow.run(recipe, resume=True)


@pytest.mark.parametrize(
    ("changes", "key", "says"),
    [
        ({"demonstrations": None}, "demonstrations", "give demonstrations.train, rows with answers"),
        ({"algorithm.name": "grpo", "algorithm.mixture": None}, "demonstrations", "take algorithm.name: chord"),
        ({"algorithm.groups.updates_per_step": 2, "demonstrations.per_step": 1}, "per_step", "1 are too few for 2"),
        ({"algorithm.advantage": {"estimator": "gae"}, "algorithm.critic": {}}, "mixture", "a critic has no values"),
    ],
)
def test_what_does_not_go_together_is_refused(write, changes: dict[str, Any], key: str, says: str):
    recipe, _ = write("run")
    with pytest.raises(RecipeError) as raised:
        load_recipe(recipe, [f"{name}={json.dumps(value)}" for name, value in changes.items()])
    assert any(key in str(problem) and says in str(problem) for problem in raised.value.problems)


def test_a_row_without_an_answer_is_no_demonstration_and_named(write, tmp_path: Path):
    recipe, _ = write("run")
    (tmp_path / "shown.jsonl").write_text(json.dumps({"prompt": "Say z."}) + "\n")
    with pytest.raises(RecipeError, match=r"demonstrations\.train: .*\n.*it has no assistant answer to learn"):
        rlflow.run(recipe)
