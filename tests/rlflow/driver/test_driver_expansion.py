"""Whole runs that train new layers between those of a model: what is learnt, what stays to the bit, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rlflow
from rlflow import checkpoint
from rlflow.cli.main import main
from tests.local_actors import use_local_actors

RECIPE = """
run: {{output_dir: {out}, seed: 3, steps: 2, save_every: 1}}
model: {{path: {model}, expand: {{new_layers: 2}}}}
data: {{train: {{path: {rows}}}, prompts_per_step: 4, max_tokens: 64, max_prompt_tokens: 32}}
trainer: {{learning_rate: 1.0e-2, tokens_per_micro_batch: 128}}
tracking: [jsonl]
"""
ONLINE = """
algorithm: {{name: grpo, group_size: 4}}
rewards: [{{plugin: "{plugin}:shortness"}}]
rollout: {{engine: torch, max_new_tokens: 6}}
"""
NEW = (1, 3)
"""Of the four layers that the tiny model's two become."""

Run = Callable[..., Path]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, tmp_path: Path) -> Run:
    use_local_actors(monkeypatch)
    rows, plugin = tmp_path / "rows.jsonl", tmp_path / "reward.py"
    prompts = [f"Say {word}." for word in ("one", "two", "three", "four")]
    rows.write_text("".join(json.dumps({"prompt": prompt, "completion": "yes"}) + "\n" for prompt in prompts))
    plugin.write_text(
        "def shortness(prompts, completions, completion_ids, **columns):\n"
        "    return [-float(len(ids)) - 0.1 * sum(ids) / len(ids) for ids in completion_ids]\n"
    )

    def start(directory: str = "run", algorithm: str = "algorithm: {{name: sft}}", resume: bool = False, **given: Any):
        recipe, out = tmp_path / "recipe.yaml", tmp_path / directory
        recipe.write_text((RECIPE + algorithm).format(out=out, model=tiny_model_dir, rows=rows, plugin=plugin))
        rlflow.run(recipe, overrides=given, resume=resume)
        return out

    return start


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def is_new(name: str) -> bool:
    return any(f".layers.{layer}." in name for layer in NEW)


def test_new_layers_are_trained_and_all_else_is_kept_to_the_bit(run: Run, tiny_model_dir: Path):
    directory = run()
    base, start, end = (weights_of(path) for path in (tiny_model_dir, directory / "initial_model", directory / "final"))
    assert end.keys() == start.keys() and len(end) == len(base) + 2 * 11
    assert all(torch.equal(end[name], start[name]) != is_new(name) or "norm" in name for name in end)
    for name, values in end.items():
        if not is_new(name):
            layer = name.replace(".layers.2.", ".layers.1.")
            assert torch.equal(values, base[layer]), name
    assert len(AutoModelForCausalLM.from_pretrained(directory / "final").model.layers) == 4
    saved = load_file(next((directory / "checkpoints" / "step_000002").glob("state-*.safetensors")))
    assert all(is_new(name) for name in saved if name.startswith("model/"))


@pytest.mark.slow
def test_a_run_of_new_layers_that_is_resumed_ends_like_one_never_stopped(run: Run, tmp_path: Path):
    whole, stopped = run("whole"), run("stopped")
    assert main(["export", str(whole), str(tmp_path / "copy"), "--checkpoint", "2"]) == 0
    copy, end = weights_of(tmp_path / "copy"), weights_of(whole / "final")
    assert copy.keys() == end.keys() and all(torch.equal(copy[name], end[name]) for name in end)
    (stopped / "checkpoints" / "step_000002").rename(tmp_path / "later")
    (stopped / "final").rename(tmp_path / "final")
    checkpoint.link(stopped / "checkpoints", "latest", stopped / "checkpoints" / "step_000001")
    run("stopped", resume=True)
    again = weights_of(stopped / "final")
    assert all(torch.equal(again[name], end[name]) for name in end)
    with pytest.raises(rlflow.DataError, match=r"has checkpoints of 2 new layers \(2 groups\) in .*, and the recipe"):
        run("stopped", resume=True, **{"run.steps": 3, "model.expand.groups": 1})


@pytest.mark.slow
def test_engines_generate_with_new_layers_and_the_reference_is_the_model_without(run: Run):
    directory = run("online", ONLINE, **{"algorithm.kl.coef": 0.1})
    first, last = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()][1:]
    assert max(line["mismatch/logprob_abs_diff"] for line in (first, last)) < 1e-5
    assert first["kl/ref"] == pytest.approx(0.0, abs=1e-7)
    assert last["kl/ref"] > 1e-5


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"model.expand.new_layers": 3}, r"model\.expand\.new_layers: the model's 2 layers are not cut into 3 groups"),
        ({"model.expand.groups": 4}, r"model\.expand\.groups: does not divide the 2 new layers"),
        ({"model.adapter": {}}, r"model\.expand: trains new layers, and an adapter none: remove one"),
        ({"algorithm.name": "reward_model"}, r"model\.expand: is of models that write, and reward_model trains"),
    ],
)
def test_what_does_not_go_with_new_layers_is_said_before_the_start(run: Run, given: dict[str, Any], says: str):
    with pytest.raises((rlflow.RecipeError, rlflow.DataError), match=says):
        run(**given)
