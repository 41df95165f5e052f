"""Several optimizer updates a rollout batch, in whole runs of every online row, against a plain loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rlflow
from rlflow.algorithms.batch import TensorBatch
from rlflow.algorithms.objectives import policy_objective
from rlflow.batching import pack
from rlflow.driver import learner
from rlflow.recipe import ALGORITHMS
from tests.local_actors import use_local_actors

ONLINE = [name for name, row in ALGORITHMS.items() if row.family == "online"]
EPS, MAX_GRAD_NORM = 1e-3, 1.0
RECIPE = """
run: {{output_dir: {out}, seed: 3, steps: 2}}
model: {{path: {model}}}
algorithm: {{name: {name}, group_size: 2, groups: {{updates_per_step: 2, epochs_per_step: 2}}}}
data: {{train: {{path: {rows}}}, prompts_per_step: 4, max_prompt_tokens: 32}}
rewards: [{{plugin: "{plugin}:vowels"}}]
rollout: {{engine: torch, max_new_tokens: 6}}
trainer: {{learning_rate: 1.0e-2, optimizer: {{eps: {eps}}}, max_grad_norm: {norm}, tokens_per_micro_batch: 48}}
tracking: [jsonl]
"""
PLUGIN = """
def vowels(prompts, completions, completion_ids, **columns):
    return [sum(c in "aeiou" for c in text) + 0.1 * len(ids) for text, ids in zip(completions, completion_ids)]
"""
EVERYTHING = {
    "algorithm.correction": {"old_policy": "trainer", "mode": "truncate", "level": "sequence"},
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
    """Runs a row; every update as the driver asked for it, its metrics, and the final weights."""
    use_local_actors(monkeypatch)

    def run(name: str, **overrides: Any) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        rows, plugin, recipe = tmp_path / "rows.jsonl", tmp_path / "rewards.py", tmp_path / "recipe.yaml"
        rows.write_text("".join(json.dumps({"prompt": f"Say {word}."}) + "\n" for word in "abcdefgh"))
        plugin.write_text(PLUGIN)
        given = {"out": tmp_path / "run", "model": tiny_model_dir, "name": name, "rows": rows, "plugin": plugin}
        recipe.write_text(RECIPE.format(**given, eps=EPS, norm=MAX_GRAD_NORM))
        updates: list[dict[str, Any]] = []

        def watched(stage, samples, denominators, **options):
            metrics = update(stage, samples, denominators, **options)
            given = {"samples": samples, "denominators": denominators, "algorithm": stage.algorithm}
            updates.append({**given, **options, "metrics": metrics})
            return metrics

        update = learner.update
        monkeypatch.setattr(learner, "update", watched)
        rlflow.run(recipe, overrides=overrides)
        return updates, load_file(tmp_path / "run" / "final" / "model.safetensors")

    return run


def replayed(model_dir: Path, updates: list[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights before and after the updates in plain torch: transformers' forward pass, one sample after the other."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), eps=EPS, weight_decay=0.0)
    for update in updates:
        ((micro_batch,),) = pack(update["samples"], max_tokens=100_000, num_ranks=1)
        logprobs, entropies = [], []
        for tokens in np.split(micro_batch.token_ids, micro_batch.cu_seqlens[1:-1]):
            ids = torch.tensor(tokens, dtype=torch.long)
            table = torch.log_softmax(model(ids[None]).logits[0, :-1] / update["temperature"], dim=1)
            first = torch.zeros(1)
            logprobs += [first, table.gather(1, ids[1:, None]).squeeze(1)]
            entropies += [first, -(table.exp() * table).sum(dim=1)]
        batch = TensorBatch.from_numpy(micro_batch, "cpu")
        loss, _ = policy_objective(
            torch.cat(logprobs), torch.cat(entropies), batch, update["algorithm"], update["denominators"]
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.param_groups[0]["lr"] = update["learning_rate"]
        optimizer.step()
        optimizer.zero_grad()
    return start, {name: p.detach() for name, p in model.named_parameters()}


def has_loss(update: dict[str, Any]) -> bool:
    return any(sample.loss_mask.any() for sample in update["samples"])


def check(updates: list[dict[str, Any]], final: dict[str, torch.Tensor], model_dir: Path) -> None:
    assert len(updates) == 2 * 2 * 2
    for step in (updates[:4], updates[4:]):
        # 0 where every completion of a half was truncated, and is masked.
        assert step[0]["metrics"]["ratio/mean"] == pytest.approx(float(has_loss(step[0])), abs=1e-4)
        assert all(abs(later["metrics"]["ratio/mean"] - 1.0) > 1e-4 for later in step[2:])
        # Two halves, twice: the second pass has the samples of the first, with the logprobs of before any update.
        for first, second in ((step[0], step[2]), (step[1], step[3])):
            for one, other in zip(first["samples"], second["samples"], strict=True):
                for field in ("token_ids", "advantages", "old_logprobs", "proximal_logprobs", "ref_logprobs"):
                    np.testing.assert_array_equal(getattr(one, field), getattr(other, field), err_msg=field)
        ids = [sample.token_ids.tobytes() for update in step[:2] for sample in update["samples"]]
        assert len(ids) == 8
    start, expected = replayed(model_dir, updates)
    assert final.keys() == expected.keys()
    moved = torch.stack([(expected[name] - start[name]).norm() for name in final]).norm()
    apart = torch.stack([(final[name] - expected[name]).norm() for name in final]).norm()
    assert moved > 1e-2
    assert apart < 1e-3 * moved


@pytest.mark.parametrize("name", ONLINE)
def test_the_weights_are_those_of_a_plain_loop(run, tiny_model_dir, name):
    check(*run(name), tiny_model_dir)


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_with_every_option_on_the_weights_are_those_of_a_plain_loop(run, tiny_model_dir, name):
    updates, final = run(name, **EVERYTHING)
    assert all(sample.proximal_logprobs is not None for update in updates for sample in update["samples"])
    assert any("correction/weight_mean" in update["metrics"] for update in updates)
    assert sum(has_loss(update) for update in updates) > 4
    check(updates, final, tiny_model_dir)
