"""Whole runs whose adapter starts from what PEFT computes of the model and the data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rlflow
from rlflow import checkpoint
from rlflow.cli.main import main
from tests.local_actors import use_local_actors

RECIPE = """
run: {{output_dir: {out}, seed: 3, steps: 2, save_every: 1}}
model: {{path: {model}, adapter: {{peft: {{peft_type: LORA, r: 4, lora_alpha: 8, init_lora_weights: {start}}}}}}}
data: {{train: {{path: {rows}}}, prompts_per_step: 4, max_tokens: 64, max_prompt_tokens: 48}}
trainer: {{learning_rate: 1.0e-2, tokens_per_micro_batch: 128}}
tracking: [jsonl]
"""
SFT = "algorithm: {{name: sft}}"
ONLINE = """
algorithm: {{name: grpo, group_size: 4}}
rewards: [{{plugin: "{plugin}:shortness"}}]
rollout: {{engine: torch, max_new_tokens: 6}}
"""
Run = Callable[..., Path]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, tmp_path: Path) -> Run:
    use_local_actors(monkeypatch)
    rows, plugin = tmp_path / "rows.jsonl", tmp_path / "reward.py"
    prompts = [f"Say {word}, and say it again." for word in ("one", "two", "three", "four", "five", "six")]
    rows.write_text("".join(json.dumps({"prompt": prompt, "completion": "yes"}) + "\n" for prompt in prompts))
    plugin.write_text(
        "def shortness(prompts, completions, completion_ids, **columns):\n"
        "    return [-float(len(ids)) - 0.1 * sum(ids) / len(ids) for ids in completion_ids]\n"
    )

    def start(how: str, directory: str, algorithm: str = SFT, resume: bool = False, **given: Any) -> Path:
        recipe, out = tmp_path / "recipe.yaml", tmp_path / directory
        text = (RECIPE + algorithm).format(out=out, model=tiny_model_dir, rows=rows, plugin=plugin, start=how)
        recipe.write_text(text)
        rlflow.run(recipe, overrides=given, resume=resume)
        return out

    return start


def adapter_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("start", ["pissa", "eva"])
def test_rl_begins_at_the_base_and_engines_generate_with_what_is_trained(run: Run, start: str):
    directory = run(start, "online", ONLINE, **{"algorithm.kl.coef": 0.1})
    first, last = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()][1:]
    assert max(line["mismatch/logprob_abs_diff"] for line in (first, last)) < 2e-5
    assert first["kl/ref"] == pytest.approx(0.0, abs=1e-6)
    assert last["kl/ref"] > 1e-5


@pytest.mark.slow
def test_a_run_from_gradients_is_resumed_and_exported_to_the_bit(run: Run, tiny_model_dir: Path, tmp_path: Path):
    whole, stopped = run("lora_ga", "whole"), run("lora_ga", "stopped")
    end = adapter_of(whole / "final")
    assert main(["export", str(whole), str(tmp_path / "copy"), "--checkpoint", "2"]) == 0
    assert main(["export", str(whole), str(tmp_path / "merged"), "--merge"]) == 0
    (stopped / "checkpoints" / "step_000002").rename(tmp_path / "later")
    (stopped / "final").rename(tmp_path / "final")
    checkpoint.link(stopped / "checkpoints", "latest", stopped / "checkpoints" / "step_000001")
    run("lora_ga", "stopped", resume=True)
    for other in (adapter_of(tmp_path / "copy"), adapter_of(stopped / "final")):
        assert other.keys() == end.keys() and all(torch.equal(other[name], end[name]) for name in end)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    served = PeftModel.from_pretrained(base, str(whole / "final")).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, served(ids).logits, rtol=0, atol=1e-4)
        with served.disable_adapter():
            assert (merged(ids).logits - served(ids).logits).abs().max() > 1e-2
