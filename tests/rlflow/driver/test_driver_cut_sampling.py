"""Whole runs that sample from a part of the distribution, or from a tempered one, on the policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import rlflow
from tests.local_actors import use_local_actors

RECIPE = """
run: {{output_dir: {out}, seed: 3, steps: 1}}
model: {{path: {model}}}
algorithm: {{name: {name}, group_size: 2}}
data: {{train: {{path: {rows}}}, prompts_per_step: 4, max_prompt_tokens: 32}}
rewards: [{{plugin: "{plugin}:length"}}]
rollout: {{engine: torch, max_new_tokens: 6}}
trainer: {{learning_rate: 1.0e-3}}
tracking: [jsonl]
"""


@pytest.fixture
def first_step(monkeypatch, tmp_path, tiny_model_dir):
    """The metrics of a row's first step: reference, trainer and engine have the same weights."""
    use_local_actors(monkeypatch)

    def run(name: str, **overrides: Any) -> dict[str, float]:
        rows, plugin, recipe = tmp_path / "rows.jsonl", tmp_path / "rewards.py", tmp_path / "recipe.yaml"
        rows.write_text("".join(json.dumps({"prompt": f"Say {word}."}) + "\n" for word in "abcd"))
        plugin.write_text(
            "def length(prompts, completions, **columns):\n    return [float(len(c)) for c in completions]\n"
        )
        given = {"out": tmp_path / "run", "model": tiny_model_dir, "name": name, "rows": rows, "plugin": plugin}
        recipe.write_text(RECIPE.format(**given))
        rlflow.run(recipe, overrides=overrides)
        return json.loads((Path(tmp_path) / "run" / "metrics.jsonl").read_text().splitlines()[1])

    return run


CUTS = pytest.mark.parametrize(
    "cut",
    [{"rollout.top_p": 0.5}, {"rollout.top_k": 2}, {"sampling.min_p": 0.5}, {"sampling.repetition_penalty": 1.5}],
)


@pytest.mark.slow
@CUTS
@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_the_kl_that_has_a_target_is_the_trainers_and_0_before_the_policy_moves(first_step, cut, placement):
    kl = {"coef": 0.1, "target": 0.5, "horizon": 100, "placement": placement, "estimator": "k1"}
    metrics = first_step("grpo", **cut, **{"algorithm.kl": kl})
    assert metrics["kl/sequence"] == pytest.approx(0.0, abs=1e-4)
    assert metrics["kl/ref"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.slow
@CUTS
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_nothing_is_made_of_the_engines_logprobs_where_sampling_is_cut(first_step, cut, name):
    metrics = first_step(name, **cut)
    assert metrics["ratio/mean"] == metrics["ratio/value_max"] == 1.0
    assert not [key for key in metrics if key.startswith(("mismatch/", "correction/"))]


@pytest.mark.slow
def test_tempered_sampling_cuts_nothing_so_engine_and_trainer_agree(first_step):
    metrics = first_step("grpo", **{"rollout.temperature": 0.5})
    assert metrics["mismatch/logprob_abs_diff_max"] < 1e-4
    assert metrics["correction/weight_mean"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["correction/bounded_fraction"] == 0.0
