"""Whole runs of a mixture of experts, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import rlflow
from tests.local_actors import use_local_actors

pytestmark = pytest.mark.slow

RECIPE = """
run: {{output_dir: {out}, seed: 3, steps: 4}}
model: {{path: {model}, router: {{balance_coef: {balance}, z_coef: 1.0e-3}}}}
algorithm: {algorithm}
data: {{train: {{path: {rows}}}, prompts_per_step: 4}}
trainer: {{learning_rate: 3.0e-3, tokens_per_micro_batch: 64}}
tracking: [jsonl]
"""
ONLINE = """
rewards: [{{plugin: "{plugin}:shortness"}}]
rollout: {{engine: torch, max_new_tokens: 6}}
"""
REWARD = "def shortness(prompts, completions, **columns):\n    return [-len(text) / 10 for text in completions]\n"


@pytest.fixture(autouse=True)
def local(monkeypatch):
    use_local_actors(monkeypatch)


def run(directory: Path, model: Path, recipe: str, algorithm: str, balance: float = 0.1) -> list[dict[str, float]]:
    """Metrics of the steps."""
    directory.mkdir(exist_ok=True)
    plugin, rows = directory / "rewards.py", directory / "rows.jsonl"
    plugin.write_text(REWARD)
    words = ["one", "two", "three", "four"]
    rows.write_text("".join(json.dumps({"prompt": f"Say {word}.", "response": word}) + "\n" for word in words))
    given = {"out": directory / "out", "model": model, "rows": rows, "plugin": plugin, "balance": balance}
    path = directory / "recipe.yaml"
    path.write_text(recipe.format(algorithm=algorithm, **given))
    rlflow.run(path)
    return [json.loads(line) for line in (directory / "out" / "metrics.jsonl").read_text().splitlines()]


def test_fine_tuning_reports_how_evenly_experts_are_used(tmp_path, tiny_moe_dir):
    steps = run(tmp_path, tiny_moe_dir, RECIPE, "{name: sft}")
    for step in steps[-4:]:
        assert 1.0 < step["moe/balance_loss"] < 4.0
        assert step["moe/loss"] == pytest.approx(0.1 * step["moe/balance_loss"] + 1e-3 * step["moe/z_loss"])
        assert 1.0 <= step["moe/max_load"] <= 4.0
        assert 0.0 <= step["moe/dead_fraction"] < 1.0


def test_the_balance_loss_evens_the_experts_out(tmp_path, tiny_moe_dir):
    strong, weak = (
        run(tmp_path / str(balance), tiny_moe_dir, RECIPE, "{name: sft}", balance)[-1]["moe/balance_loss"]
        for balance in (10.0, 0.0)
    )
    assert strong < weak - 0.1


def test_engines_generate_with_the_experts_that_were_trained(tmp_path, tiny_moe_dir):
    """Their logprobs of their own tokens would differ from the trainer's if a sync missed or mixed up an expert."""
    steps = run(tmp_path, tiny_moe_dir, RECIPE + ONLINE, "{name: grpo, group_size: 2}")
    trained = [step for step in steps if "mismatch/logprob_abs_diff_max" in step]
    assert len(trained) == 4
    assert all(step["mismatch/logprob_abs_diff_max"] < 1e-4 for step in trained)
    before, after = (load_file(path / "model.safetensors") for path in (tiny_moe_dir, tmp_path / "out" / "final"))
    assert before.keys() == after.keys()
    assert abs(after["model.layers.2.mlp.gate.weight"] - before["model.layers.2.mlp.gate.weight"]).max() > 1e-4


def test_ppo_reports_the_routers_of_policy_and_critic_apart(tmp_path, tiny_moe_dir):
    step = run(tmp_path, tiny_moe_dir, RECIPE + ONLINE, "{name: ppo}")[-1]
    assert step["moe/balance_loss"] > 1.0
    assert step["critic_moe/balance_loss"] > 1.0


def test_an_adapter_leaves_experts_and_routers_as_they_are(tmp_path, tiny_moe_dir):
    adapter = "adapter: {{rank: 4, target_modules: [q_proj, o_proj]}}"
    recipe = RECIPE.replace("router: {{", f"{adapter}, router: {{{{") + ONLINE
    steps = run(tmp_path, tiny_moe_dir, recipe, "{name: grpo, group_size: 2}")
    assert all(step["mismatch/logprob_abs_diff_max"] < 1e-4 for step in steps if "moe/max_load" in step)
    trained = load_file(tmp_path / "out" / "final" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in trained} >= {"q_proj", "o_proj"}
    assert not any("experts" in name or ".gate." in name for name in trained)
