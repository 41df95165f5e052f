"""Rows beyond GRPO, whole runs: preference losses, reward models, PPO with its critic.

One rank runs in this process; several are real Ray actors.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import rlflow
from rlflow.data.errors import DataError
from tests.local_actors import use_local_actors

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]

OFFLINE = """
run: {{output_dir: {out}, seed: 3, steps: 6, save_every: 3, keep_checkpoints: 5}}
model: {{path: {model}}}
algorithm: {{name: {name}}}
data: {{train: {{path: {rows}}}, prompts_per_step: 4, max_tokens: 64}}
trainer: {{learning_rate: 3.0e-3, tokens_per_micro_batch: 128}}
evaluation: {{data: {{path: {rows}}}, every: 3}}
tracking: [jsonl]
"""

PPO = """
run: {{output_dir: {out}, seed: 3, steps: 4, save_every: 2, keep_checkpoints: 5}}
model: {{path: {model}}}
algorithm: {{name: ppo, group_size: 2, kl: {{target: 0.05, horizon: 100}}, critic: {{learning_rate: 1.0e-2}},
             groups: {{updates_per_step: 2, epochs_per_step: 2}}}}
data: {{train: {{path: {rows}}}, prompts_per_step: 4, max_prompt_tokens: 32}}
rewards: [{{plugin: "{plugin}:shortness"}}]
rollout: {{engine: torch, max_new_tokens: 6}}
trainer: {{learning_rate: 1.0e-3}}
tracking: [jsonl]
"""


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs() -> list[dict]:
    return [
        {
            "chosen": [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": word}],
            "rejected": [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": "no" * k}],
        }
        for k, word in enumerate(WORDS, start=1)
    ]


def judged() -> list[dict]:
    rows = []
    for k, word in enumerate(WORDS):
        question = {"role": "user", "content": f"Say {word}."}
        answer = {"role": "assistant", "content": word if k % 3 else "never"}
        rows.append({"messages": [question, answer], "label": bool(k % 3)})
    return rows


@pytest.fixture
def local(monkeypatch):
    use_local_actors(monkeypatch)


@pytest.fixture
def run_offline(tiny_model_dir, tmp_path):
    def run(name: str, rows: list[dict], directory: str = "run", resume: bool = False, **overrides) -> Path:
        data = write_rows(tmp_path / "rows.jsonl", rows)
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(OFFLINE.format(out=tmp_path / directory, model=tiny_model_dir, name=name, rows=data))
        rlflow.run(recipe, overrides=overrides, resume=resume)
        return tmp_path / directory

    return run


def metrics_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(path / "final" / "model.safetensors") for path in (one, other))
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


@pytest.mark.ray
def test_dpo_starts_at_log_two_and_raises_the_margin(ray_session, run_offline):
    lines = metrics_of(run_offline("dpo", pairs()))
    assert lines[0]["eval/heldout/loss/total"] == pytest.approx(0.693147, abs=1e-5)
    assert lines[0]["eval/heldout/preference/margin"] == pytest.approx(0.0, abs=1e-5)
    assert lines[-1]["eval/heldout/preference/margin"] > 0.1
    assert lines[-1]["eval/heldout/preference/accuracy"] == 1.0


def test_rows_that_are_left_out_are_told(local, run_offline, capsys):
    long = {"prompt": "Say much.", "completion": "much " * 40}
    overrides = {"tracking": ["console"], "data.overlong": "drop", "run.steps": 1, "evaluation": None}
    run_offline("sft", [{"prompt": "Say hi.", "completion": "hi"}] * 4 + [long], **overrides)
    assert "data.train: 1 of 5 rows left out:" in capsys.readouterr().out


def test_reference_logprobs_computed_before_the_run_or_on_the_way_give_the_same_run(local, run_offline):
    on_the_way = run_offline("dpo", pairs(), "on_the_way")
    before = run_offline("dpo", pairs(), "before", **{"reference.precompute": True})
    for a, b in zip(metrics_of(on_the_way)[1:], metrics_of(before)[1:], strict=True):
        assert b["loss/total"] == pytest.approx(a["loss/total"], rel=1e-5)


def test_a_resumed_dpo_run_ends_like_one_never_stopped(local, run_offline, tmp_path):
    from rlflow import checkpoint

    whole, stopped = run_offline("dpo", pairs(), "whole"), run_offline("dpo", pairs(), "stopped")
    (stopped / "checkpoints" / "step_000006").rename(tmp_path / "later")
    (stopped / "final").rename(tmp_path / "final")
    checkpoint.link(stopped / "checkpoints", "latest", stopped / "checkpoints" / "step_000003")
    run_offline("dpo", pairs(), "stopped", resume=True)
    assert same_weights(whole, stopped)


def test_checkpoints_of_another_model_are_refused_before_anything_starts(local, run_offline, tiny_moe_dir):
    directory = run_offline("dpo", pairs())
    (directory / "final").rename(directory / "taken_away")
    with pytest.raises(
        DataError, match=r"run has checkpoints of .* and the recipe trains .*: set the model block back"
    ):
        run_offline("dpo", pairs(), resume=True, **{"model.path": str(tiny_moe_dir)})
    with pytest.raises(DataError, match=r"trains an adapter of .*choose another run.output_dir"):
        run_offline("dpo", pairs(), resume=True, **{"model.adapter": {"kind": "lora"}})


@pytest.mark.ray
@pytest.mark.parametrize("name", ["dpo", "kto", "reward_model"])
def test_two_ranks_learn_what_one_learns(ray_session, run_offline, monkeypatch, name):
    rows = judged() if name == "kto" else pairs()
    with monkeypatch.context() as here:
        use_local_actors(here)
        one = metrics_of(run_offline(name, rows, "one"))
    two = metrics_of(run_offline(name, rows, "two", **{"trainer.workers": 2}))
    for a, b in zip(one, two, strict=True):
        for key in a:
            if key.startswith(("loss/", "trainer/grad_norm", "eval/", "preference/", "kto/")):
                assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), (a["step"], key)


def test_kto_starts_at_a_half_and_separates_the_labels(local, run_offline):
    lines = metrics_of(run_offline("kto", judged()))
    assert lines[0]["eval/heldout/loss/kto"] == pytest.approx(0.5, abs=1e-5)
    assert lines[-1]["eval/heldout/kto/margin"] > 0.02
    assert lines[1]["kto/desirable_fraction"] in (0.5, 0.75, 1.0)


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_aot_starts_at_log_two_whatever_the_batch(local, run_offline, loss):
    lines = metrics_of(run_offline("dpo", pairs(), **{"algorithm.preference.loss": loss}))
    assert lines[1]["loss/total"] == pytest.approx(0.693147, abs=1e-5)
    assert lines[-1]["eval/heldout/preference/margin"] > 0.1


def test_a_reward_model_prefers_the_chosen_answers_and_loads_as_a_classifier(local, run_offline):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    directory = run_offline("reward_model", pairs())
    lines = metrics_of(directory)
    assert lines[0]["eval/heldout/loss/reward_model"] == pytest.approx(0.693147, abs=1e-5)
    assert lines[-1]["eval/heldout/preference/accuracy"] == 1.0
    model = AutoModelForSequenceClassification.from_pretrained(directory / "final")
    tokenizer = AutoTokenizer.from_pretrained(directory / "final")
    margins = []
    for row in pairs():
        ids = [
            torch.tensor([tokenizer.encode(tokenizer.apply_chat_template(row[side], tokenize=False))])
            for side in ("chosen", "rejected")
        ]
        with torch.no_grad():
            margins.append(float(model(ids[0]).logits - model(ids[1]).logits))
    mean = lines[-1]["eval/heldout/preference/margin"]
    assert sum(margins) / len(margins) == pytest.approx(mean, rel=1e-4)


@pytest.fixture
def run_ppo(tiny_model_dir, tmp_path):
    def run(directory: str = "run", resume: bool = False, **overrides) -> Path:
        (tmp_path / "reward.py").write_text(
            "def shortness(prompts, completions, completion_ids, **columns):\n"
            "    return [-float(len(ids)) for ids in completion_ids]\n"
        )
        rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Say {word}."} for word in WORDS])
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            PPO.format(out=tmp_path / directory, model=tiny_model_dir, rows=rows, plugin=tmp_path / "reward.py")
        )
        rlflow.run(recipe, overrides=overrides, resume=resume)
        return tmp_path / directory

    return run


@pytest.mark.slow
def test_ppo_trains_policy_and_critic_and_adapts_the_kl(local, run_ppo):
    lines = metrics_of(run_ppo())[1:]
    # The critic's head starts at 0, so its first squared error is the mean squared return.
    assert lines[0]["value/mean"] != 0.0
    assert all(line["critic/grad_norm"] > 0 and line["trainer/grad_norm"] > 0 for line in lines)
    assert lines[0]["kl/coef"] == pytest.approx(0.02)
    # The first step samples from the reference itself: its KL is 0, far below the target, so the coefficient falls.
    assert lines[1]["kl/coef"] == pytest.approx(0.02 * (1 - 0.2 * 8 / 100))
    assert lines[-1]["ratio/mean"] != pytest.approx(1.0, abs=1e-7)


@pytest.mark.slow
def test_a_resumed_ppo_run_ends_like_one_never_stopped(local, run_ppo, tmp_path):
    from rlflow import checkpoint

    whole, stopped = run_ppo("whole"), run_ppo("stopped")
    assert (stopped / "checkpoints" / "step_000002" / "critic").is_dir()
    (stopped / "checkpoints" / "step_000004").rename(tmp_path / "later")
    (stopped / "final").rename(tmp_path / "final")
    checkpoint.link(stopped / "checkpoints", "latest", stopped / "checkpoints" / "step_000002")
    run_ppo("stopped", resume=True)
    assert same_weights(whole, stopped)


@pytest.mark.slow
def test_a_run_that_cannot_go_on_keeps_the_recipe_it_was_run_with(local, run_ppo):
    directory = run_ppo()
    (directory / "final").rename(directory / "taken_away")
    recipe = (directory / "recipe.yaml").read_text()
    with pytest.raises(DataError, match=r"trainer\.optimizer\.kind was adamw, is muon"):
        # Muon has no second moments, so AdamW's cannot go on from it, nor it from AdamW's.
        run_ppo(resume=True, **{"trainer.optimizer.kind": "muon", "run.steps": 9})
    assert (directory / "recipe.yaml").read_text() == recipe
    run_ppo(resume=True, **{"run.steps": 5})
    assert "steps: 5" in (directory / "recipe.yaml").read_text()


def test_the_critic_alone_learns_while_it_warms_up(local, run_ppo, tiny_model_dir):
    directory = run_ppo(**{"algorithm.critic.warmup_steps": 4})
    final, start = load_file(directory / "final" / "model.safetensors"), load_file(tiny_model_dir / "model.safetensors")
    assert all((final[name] == start[name]).all() for name in final)
    assert all("trainer/grad_norm" not in line for line in metrics_of(directory)[1:])


@pytest.mark.ray
def test_two_critic_ranks_learn_what_one_learns(ray_session, run_ppo, monkeypatch):
    with monkeypatch.context() as here:
        use_local_actors(here)
        one = metrics_of(run_ppo("one", **{"run.steps": 2}))[1:]
    two = metrics_of(run_ppo("two", **{"run.steps": 2, "algorithm.critic.workers": 2}))[1:]
    for a, b in zip(one, two, strict=True):
        for key in ("loss/value", "value/squared_error", "critic/grad_norm", "trainer/grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), key
