"""pass@1 and pass@k: by hand, and in a run whose reward is scripted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml

import rlflow
from rlflow.driver.pass_evaluation import PassEvaluator, pass_at_k
from rlflow.types import GroupRequest, SamplingParams
from tests.local_actors import use_local_actors


@pytest.mark.parametrize(
    ("num_samples", "num_passed", "k", "expected"),
    [
        (4, 0, 1, Fraction(0)),
        (4, 1, 1, Fraction(1, 4)),
        # Of the 6 pairs of 4 samples, 3 hold the one that passed.
        (4, 1, 2, Fraction(1, 2)),
        # All pairs but the one of both that failed.
        (4, 2, 2, Fraction(5, 6)),
        (4, 1, 4, Fraction(1)),
        (5, 3, 3, Fraction(1)),
    ],
)
def test_pass_at_k_counts_the_draws_with_a_sample_that_passes(num_samples, num_passed, k, expected):
    assert pass_at_k(num_samples, num_passed, k) == pytest.approx(float(expected), abs=1e-12)


RECIPE = """
run: {{output_dir: {out}, seed: 3, steps: 1}}
model: {{path: {model}}}
algorithm: {{name: grpo, group_size: 2}}
data: {{train: {{path: {rows}}}, prompts_per_step: 4, max_prompt_tokens: 32}}
rewards: [{{plugin: "{plugin}:scripted"}}]
rollout: {{engine: torch, max_new_tokens: 4, max_num_seqs: 4}}
evaluation: {{data: {{path: {rows}}}, samples: 4, temperature: 1.0}}
tracking: [jsonl]
"""
PLUGIN = """
def scripted(prompts, completions, passing, **columns):
    # Of the samples of a prompt the first so many pass; of a group of two in training, at most both.
    seen, rewards = {}, []
    for prompt, number in zip(prompts, passing):
        text = prompt[-1]["content"]
        seen[text] = seen.get(text, 0) + 1
        rewards.append(float(seen[text] <= number))
    return rewards
"""


@pytest.mark.slow
def test_sampled_evaluation_reports_both(monkeypatch, tmp_path: Path, tiny_model_dir: Path):
    use_local_actors(monkeypatch)
    rows, plugin, recipe = tmp_path / "rows.jsonl", tmp_path / "rewards.py", tmp_path / "recipe.yaml"
    plugin.write_text(PLUGIN)
    passing = [0, 1, 2, 4]
    lines = [{"prompt": f"Say {number}.", "passing": count} for number, count in enumerate(passing)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe.write_text(RECIPE.format(out=tmp_path / "out", model=tiny_model_dir, rows=rows, plugin=plugin))
    rlflow.run(recipe)
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    for line in (metrics[0], metrics[-1]):
        assert line["eval/heldout/pass@1"] == pytest.approx((0 + 1 / 4 + 2 / 4 + 1) / 4)
        assert line["eval/heldout/pass@4"] == pytest.approx(3 / 4)
        assert line["eval/heldout/unscored_fraction"] == 0


@pytest.mark.slow
def test_several_sets_are_measured_each_in_its_own_way_and_the_first_ends_the_stage(
    monkeypatch, tmp_path: Path, tiny_model_dir: Path
):
    use_local_actors(monkeypatch)
    drawn: dict[str, SamplingParams] = {}
    begin = PassEvaluator.begin

    def note(evaluator: PassEvaluator) -> None:
        ask = evaluator.pool.ask

        def asked(requests: Sequence[GroupRequest], deliver: Any) -> None:
            drawn[evaluator.block.name] = requests[0].params
            ask(requests, deliver)

        with monkeypatch.context() as patched:
            patched.setattr(evaluator.pool, "ask", asked)
            begin(evaluator)

    monkeypatch.setattr(PassEvaluator, "begin", note)
    few, many, plugin, path = (tmp_path / name for name in ("few.jsonl", "many.jsonl", "rewards.py", "recipe.yaml"))
    plugin.write_text(PLUGIN + "\ndef half(completions, **columns):\n    return [0.5 for _ in completions]\n")
    for rows, passing in ((few, [4, 2]), (many, [0, 1, 4, 0])):
        lines = [{"prompt": f"Say {number}.", "passing": count} for number, count in enumerate(passing)]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = yaml.safe_load(RECIPE.format(out=tmp_path / "out", model=tiny_model_dir, rows=many, plugin=plugin))
    recipe["run"] |= {"steps": 4, "stop_at_score": 0.75, "save_every": 1}
    recipe["sampling"] = {"min_p": 0.01, "stop": ["zz"]}
    sampled = {"data": {"path": str(few)}, "samples": 4, "temperature": 0.7, "top_p": 0.9, "min_p": 0.0, "every": 2}
    halves = {"plugin": f"{plugin}:half"}
    recipe["evaluation"] = [
        {**sampled, "name": "few"},
        {"name": "many", "data": {"path": str(many)}, "samples": 2, "temperature": 1.5, "every": 1},
        {"name": "halves", "data": {"path": str(few)}, "max_new_tokens": 2, "reward": halves, "threshold": 0.5},
    ]
    path.write_text(yaml.safe_dump(recipe))
    rlflow.run(path)
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    # The stage is over where the first of them has the score, and then all are measured.
    assert [line["step"] for line in metrics] == [0, 1, 2]
    measured = [{key.split("/")[1] for key in line if key.startswith("eval/")} for line in metrics]
    assert measured == [{"few", "many", "halves"}, {"many"}, {"few", "many", "halves"}]
    assert metrics[2]["eval/few/pass@1"] == pytest.approx((1 + 2 / 4) / 2)
    assert metrics[2]["eval/many/pass@1"] == pytest.approx((1 / 2 + 1) / 4) and "eval/many/pass@2" in metrics[1]
    assert metrics[0]["eval/halves/pass@1"] == 1.0
    assert (drawn["few"].temperature, drawn["few"].top_p, drawn["few"].min_p) == (0.7, 0.9, 0.0)
    assert (drawn["many"].temperature, drawn["many"].top_p, drawn["many"].min_p) == (1.5, 1.0, 0.01)
    assert (drawn["halves"].temperature, drawn["halves"].max_new_tokens) == (0.0, 2)
    assert {params.stop for params in drawn.values()} == {("zz",)}
    assert (tmp_path / "out" / "checkpoints" / "best").readlink().name == "step_000002"
