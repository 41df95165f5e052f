"""Several optimizer updates a rollout batch, in whole runs of every online row, against plain_loop.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import plain_loop
import pytest
import torch
from plain_loop import Loop, clip
from safetensors.torch import load_file

import rlflow
from rlflow.data.tokenizer import build_character_tokenizer
from rlflow.recipe import ALGORITHMS
from tests.conftest import CHARACTERS, CHAT_TEMPLATE
from tests.local_actors import use_local_actors

ONLINE = [name for name, row in ALGORITHMS.items() if row.task == "online"]
RECIPE = """
run: {{output_dir: {out}, seed: 3, steps: 2}}
model: {{path: {model}}}
algorithm: {{name: {name}, group_size: {group}, groups: {{updates_per_step: {updates}, epochs_per_step: {epochs}}}}}
data: {{train: {{path: {rows}}}, prompts_per_step: 4, max_prompt_tokens: 32}}
rewards: [{{plugin: "{plugin}:vowels"}}]
rollout: {{engine: torch, max_new_tokens: 6, temperature: {temperature}}}
trainer: {{learning_rate: {rate}, optimizer: {{eps: {eps}}}, max_grad_norm: {norm}, tokens_per_micro_batch: 48}}
tracking: [jsonl]
"""
PLUGIN = """
def vowels(prompts, completions, completion_ids, **columns):
    return [sum(c in "aeiou" for c in text) + 0.1 * len(ids) for text, ids in zip(completions, completion_ids)]
"""
EVERYTHING = {
    "algorithm.correction": {"mode": "truncate", "level": "sequence"},
    "algorithm.kl": {"coef": 0.1, "estimator": "k3", "placement": "loss", "unbiased_gradient": True},
    "algorithm.loss.dual_clip": 1.5,
    "algorithm.loss.entropy_coef": 0.01,
    "algorithm.groups.reward_scaling": "normalize_sum",
    "algorithm.groups.mask_truncated": True,
    "algorithm.groups.count_masked": True,
    # Long enough for some to end by themselves.
    "rollout.max_new_tokens": 40,
}


@pytest.fixture
def run(monkeypatch, tmp_path, tiny_model_dir):
    """Runs a row and leaves its directory."""
    use_local_actors(monkeypatch)

    def run(name: str, **overrides: Any) -> Path:
        rows, plugin, recipe = tmp_path / "rows.jsonl", tmp_path / "rewards.py", tmp_path / "recipe.yaml"
        rows.write_text("".join(json.dumps({"prompt": f"Say {word}."}) + "\n" for word in "abcdefgh"))
        plugin.write_text(PLUGIN)
        text = RECIPE.format(
            out=tmp_path / "run",
            model=tiny_model_dir,
            name=name,
            rows=rows,
            plugin=plugin,
            group=plain_loop.GROUP,
            updates=plain_loop.UPDATES,
            epochs=plain_loop.EPOCHS,
            temperature=plain_loop.TEMPERATURE,
            rate=plain_loop.LEARNING_RATE,
            eps=plain_loop.EPS,
            norm=plain_loop.MAX_GRAD_NORM,
        )
        recipe.write_text(text)
        if name == "ppo":
            overrides["algorithm.critic.learning_rate"] = plain_loop.CRITIC_LEARNING_RATE
        rlflow.run(recipe, overrides=overrides)
        return tmp_path / "run"

    return run


def check(directory: Path, model_dir: Path, name: str, row: plain_loop.Row) -> None:
    """The run's weights and losses are the plain loop's, from the run's own rollouts."""
    loop = Loop(model_dir, name, row)
    start = {key: p.detach().clone() for key, p in loop.policy.named_parameters()}
    steps = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()][1:]
    assert len(steps) == 2
    for step in steps:
        losses = loop.step(directory / "rollouts" / f"step_{step['step']:06d}.parquet")
        assert step["loss/total"] == pytest.approx(sum(losses) / len(losses), rel=1e-3, abs=1e-4)
        # They are of the same weights and of the tempered distribution, to the rounding of two programs.
        assert step["mismatch/logprob_abs_diff_max"] < 1e-4
    final = load_file(directory / "final" / "model.safetensors")
    expected = {key: p.detach() for key, p in loop.policy.named_parameters()}
    assert final.keys() == expected.keys()
    moved = torch.stack([(expected[key] - start[key]).norm() for key in final]).norm()
    apart = torch.stack([(final[key] - expected[key]).norm() for key in final]).norm()
    assert moved > 1e-2
    assert apart < 1e-3 * moved


CHOICES = {
    # All tokens between the bounds: which of them would be drawn is no matter of the paper.
    "clip_cov": {"share": 1.0, "covariance_low": 0.2, "covariance_high": 1.0},
    "kl_cov": {"share": 0.25, "coef": 1.0},
}
"""Options with which a handful of tokens show what a loss does."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ONLINE)
def test_the_weights_are_those_of_a_plain_loop(run, tiny_model_dir, tmp_path, name):
    row, changes = plain_loop.ROWS[name], {f"algorithm.loss.{key}": x for key, x in CHOICES.get(name, {}).items()}
    if ALGORITHMS[name].value("mixture", None):
        row, changes = with_demonstrations(row, tmp_path)
    check(run(name, **changes), tiny_model_dir, name, row)


def with_demonstrations(row: plain_loop.Row, directory: Path) -> tuple[plain_loop.Row, dict[str, Any]]:
    """One and the same demonstration in every update, and the recipe's keys that say so."""
    rows, tokenizer = directory / "shown.jsonl", build_character_tokenizer(CHARACTERS, CHAT_TEMPLATE)
    rows.write_text((json.dumps({"prompt": "Say z.", "response": "zebra"}) + "\n") * 3)
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say z."}], tokenize=False, add_generation_prompt=True
    )
    given, answer = (tokenizer.encode(text, add_special_tokens=False) for text in (question, "zebra"))
    demonstration = plain_loop.Rollout(given, [*answer, tokenizer.eos_token_id], torch.zeros(6), 0.0, False)
    changes = {
        "demonstrations": {"train": {"path": str(rows)}, "per_step": plain_loop.UPDATES},
        "algorithm.mixture": {"mu_peak": 0.3, "mu_valley": 0.3, "mu_decay_steps": 0, "phi": True},
    }
    return replace(row, shown=(demonstration, 0.3)), changes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_with_every_option_on_the_weights_are_those_of_a_plain_loop(run, tiny_model_dir, name):
    bounds = (0.2, 0.2) if name == "grpo" else (3e-4, 4e-4)
    row = replace(plain_loop.ROWS[name], loss=clip(*bounds, dual=1.5), kl=("k3", 0.1), everything=True)
    directory = run(name, **EVERYTHING)
    trained = [not r.is_truncated for path in directory.glob("rollouts/*") for r in plain_loop.read(path)]
    assert any(trained) and not all(trained)
    check(directory, tiny_model_dir, name, replace(row, max_new_tokens=40))
