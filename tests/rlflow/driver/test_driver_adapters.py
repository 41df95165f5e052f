"""Whole runs that train an adapter: what changes, what does not, and what is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlflow
from rlflow import checkpoint
from rlflow.cli.main import main
from rlflow.driver.learner import Learner
from tests.local_actors import use_local_actors

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]

SHARED = """
run: {{output_dir: {out}, seed: 3, steps: 3, save_every: 1, keep_checkpoints: 5}}
model: {{path: {model}, adapter: {{}}}}
data: {{train: {{path: {rows}}}, prompts_per_step: 4, max_tokens: 64, max_prompt_tokens: 32}}
trainer: {{learning_rate: 3.0e-2, tokens_per_micro_batch: 128}}
tracking: [jsonl]
"""
ONLINE = """
algorithm: {{name: grpo, group_size: 4}}
rewards: [{{plugin: "{plugin}:shortness"}}]
rollout: {{engine: torch, max_new_tokens: 6}}
"""
ALGORITHMS = {"sft": "algorithm: {{name: sft}}", "dpo": "algorithm: {{name: dpo}}", "grpo": ONLINE}

Run = Callable[..., Path]
Write = Callable[[str, str], tuple[Path, Path]]


def rows_of(name: str) -> list[dict[str, Any]]:
    def say(word: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": answer}]

    if name == "grpo":
        return [{"prompt": f"Say {word}."} for word in WORDS]
    if name == "sft":
        return [{"messages": say(word, word)} for word in WORDS]
    return [{"chosen": say(word, word), "rejected": say(word, "no" * k)} for k, word in enumerate(WORDS, start=1)]


@pytest.fixture
def write_recipe(tiny_model_dir: Path, tmp_path: Path) -> Write:
    def write(name: str, directory: str) -> tuple[Path, Path]:
        rows, plugin = tmp_path / f"{name}.jsonl", tmp_path / "reward.py"
        rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(name)))
        plugin.write_text(
            "def shortness(prompts, completions, completion_ids, **columns):\n"
            "    return [-float(len(ids)) - 0.1 * sum(ids) / len(ids) for ids in completion_ids]\n"
        )
        recipe, out = tmp_path / "recipe.yaml", tmp_path / directory
        text = SHARED + ALGORITHMS[name]
        recipe.write_text(text.format(out=out, model=tiny_model_dir, rows=rows, plugin=plugin))
        return recipe, out

    return write


def _runner(write: Write) -> Run:
    def run(name: str, directory: str = "run", resume: bool = False, **overrides: Any) -> Path:
        recipe, out = write(name, directory)
        rlflow.run(recipe, overrides=overrides, resume=resume)
        return out

    return run


@pytest.fixture
def run(monkeypatch, write_recipe: Write) -> Run:
    use_local_actors(monkeypatch)
    return _runner(write_recipe)


@pytest.fixture
def run_in_actors(ray_session, write_recipe: Write) -> Run:
    return _runner(write_recipe)


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def adapter_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "final" / "adapter_model.safetensors")


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(torch.arange(2, 40)[None]).logits[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_a_run_leaves_a_peft_directory_and_the_base_as_it_was(run: Run, name: str, tiny_model_dir: Path):
    from peft import PeftModel

    before = (tiny_model_dir / "model.safetensors").read_bytes()
    directory = run(name)
    adapter = adapter_of(directory)
    assert len(adapter) == 2 * 7 * 2
    assert all(values.dtype == torch.float32 for values in adapter.values())
    assert all((values != 0).any() for key, values in adapter.items() if "lora_B" in key)
    assert (tiny_model_dir / "model.safetensors").read_bytes() == before
    config = json.loads((directory / "final" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model_dir)
    assert AutoTokenizer.from_pretrained(directory / "final").chat_template
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    plain = logits_of(base)
    adapted = PeftModel.from_pretrained(base, str(directory / "final")).eval()
    assert (logits_of(adapted) - plain).abs().max() > 1e-3
    with adapted.disable_adapter():
        assert torch.equal(logits_of(adapted), plain)


def test_ppo_trains_an_adapter_beside_a_whole_critic(run: Run):
    overrides = {"algorithm.name": "ppo", "algorithm.group_size": 1, "algorithm.critic.learning_rate": 1e-2}
    directory = run("grpo", **overrides)
    lines = metrics_of(directory)[1:]
    assert all(line["critic/grad_norm"] > 0 and line["trainer/grad_norm"] > 0 for line in lines)
    assert max(line["mismatch/logprob_abs_diff"] for line in lines) < 1e-5
    (path,) = (directory / "checkpoints" / "step_000003" / "critic").glob("state-*.safetensors")
    assert "model/score.weight" in load_file(path)
    assert not any(".lora_" in key for key in load_file(path))


def test_checkpoints_hold_the_adapter_alone(run: Run):
    directory = run("sft")
    (path,) = (directory / "checkpoints" / "step_000002").glob("state-*.safetensors")
    saved = load_file(path)
    assert all(".lora_" in key for key in saved if not key.startswith("rng/"))
    assert sum(key.startswith("model/") for key in saved) == 28


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.slow
def test_a_resumed_run_ends_like_one_never_stopped(run: Run, name: str, kind: str, tmp_path: Path):
    given: dict[str, Any] = {"model.adapter.kind": kind}
    if name == "sft":
        given["model.adapter.dropout"] = 0.2
    whole, stopped = run(name, "whole", **given), run(name, "stopped", **given)
    (stopped / "checkpoints" / "step_000003").rename(tmp_path / "later")
    (stopped / "checkpoints" / "step_000002").rename(tmp_path / "also_later")
    (stopped / "final").rename(tmp_path / "final")
    checkpoint.link(stopped / "checkpoints", "latest", stopped / "checkpoints" / "step_000001")
    run(name, "stopped", resume=True, **given)
    one, other = adapter_of(whole), adapter_of(stopped)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_was_generated_is_scored_alike_after_every_sync(run: Run, kind: str):
    lines = metrics_of(run("grpo", **{"model.adapter.kind": kind}))[1:]
    assert len(lines) == 3
    assert max(line["mismatch/logprob_abs_diff"] for line in lines) < 1e-5
    # The first step samples from the reference itself.
    assert lines[0]["kl/ref"] == pytest.approx(0.0, abs=1e-6)
    assert lines[-1]["kl/ref"] > 1e-4


LOKR: dict[str, Any] = {"model.adapter.peft": {"peft_type": "LOKR", "r": 4}}
EXPERTS: dict[str, Any] = {
    "model.adapter.peft": {"peft_type": "LORA", "r": 2, "target_parameters": ["mlp.experts.gate_up_proj"]}
}


@pytest.mark.slow
@pytest.mark.parametrize("given", [LOKR, EXPERTS], ids=["lokr", "experts"])
def test_engines_generate_with_what_another_method_makes_of_the_weights(
    run: Run, given: dict[str, Any], tiny_moe_dir: Path
):
    path = {"model.path": str(tiny_moe_dir)} if given is EXPERTS else {}
    directory = run("grpo", **given, **path)
    lines = metrics_of(directory)[1:]
    assert max(line["mismatch/logprob_abs_diff"] for line in lines) < 1e-5
    assert lines[0]["kl/ref"] == pytest.approx(0.0, abs=1e-6)
    assert lines[-1]["kl/ref"] > 1e-4
    later = metrics_of(run("grpo", "later", **path, **{"model.adapter": {"path": str(directory / "final")}}))[1:]
    assert later[0]["kl/ref"] == pytest.approx(0.0, abs=1e-6)
    assert max(line["mismatch/logprob_abs_diff"] for line in later) < 1e-5


@pytest.mark.slow
def test_a_runs_ranks_become_fewer_and_what_is_generated_has_those_that_are_left(run: Run, tmp_path: Path):
    peft = {"peft_type": "ADALORA", "init_r": 6, "target_r": 3, "orth_reg_weight": 0.1}
    given = {"model.adapter.peft": peft, "run.steps": 4}
    directory = run("grpo", "whole", **given)
    lines = metrics_of(directory)[1:]
    assert max(line["mismatch/logprob_abs_diff"] for line in lines) < 1e-5
    assert [line["adapter/rank"] for line in lines] == sorted((line["adapter/rank"] for line in lines), reverse=True)
    values = [tensor for key, tensor in adapter_of(directory).items() if "lora_E" in key]
    assert lines[0]["adapter/rank"] == 6 and 3 * 14 <= sum(int((tensor != 0).sum()) for tensor in values) < 5 * 14
    assert main(["export", str(directory), str(tmp_path / "copy"), "--checkpoint", "4"]) == 0
    one, other = (path / "adapter_model.safetensors" for path in (directory / "final", tmp_path / "copy"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_a_resumed_run_of_another_method_ends_like_one_never_stopped(run: Run, tmp_path: Path):
    whole, stopped = run("dpo", "whole", **LOKR), run("dpo", "stopped", **LOKR)
    (stopped / "checkpoints" / "step_000003").rename(tmp_path / "later")
    (stopped / "final").rename(tmp_path / "final")
    checkpoint.link(stopped / "checkpoints", "latest", stopped / "checkpoints" / "step_000002")
    run("dpo", "stopped", resume=True, **LOKR)
    one, other = adapter_of(whole), adapter_of(stopped)
    assert len(one) > 7 and all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(rlflow.DataError, match=r"another model\.adapter\.peft"):
        run("dpo", "stopped", resume=True, **{"run.steps": 4, "model.adapter.peft": {"peft_type": "LOHA"}})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_the_base_as_reference_gives_the_run_that_a_reference_model_gives(run: Run, name: str, tiny_model_dir: Path):
    shared, placed = run(name, "shared"), run(name, "placed", **{"reference.path": str(tiny_model_dir)})
    one, other = adapter_of(shared), adapter_of(placed)
    assert all(torch.equal(one[key], other[key]) for key in one)
    losses = [[line["loss/total"] for line in metrics_of(path) if line["step"]] for path in (shared, placed)]
    assert losses[0] == losses[1]


def test_another_model_as_reference_is_the_one_that_scores(
    run: Run, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = AutoModelForCausalLM.from_pretrained(tiny_model_dir).requires_grad_(False)
    for parameter in other.parameters():
        parameter.mul_(0.8)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "other")
    trained: list[Any] = []
    update = Learner.update

    def watched_update(learner: Learner, samples: Any, *args: Any) -> dict[str, float]:
        trained.extend(samples)
        return update(learner, samples, *args)

    monkeypatch.setattr(Learner, "update", watched_update)
    run("dpo", **{"reference.path": str(tmp_path / "other"), "run.steps": 1})
    assert len(trained) == 8
    for sample in trained:
        tokens = torch.from_numpy(sample.token_ids).long()
        logprobs = other(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        mask = torch.from_numpy(sample.loss_mask[1:])
        found = torch.from_numpy(sample.ref_logprobs[1:])
        torch.testing.assert_close(found[mask], logprobs[mask], rtol=0, atol=1e-4)


def test_reference_logprobs_may_be_computed_before_the_run(run: Run):
    on_the_way, before = run("dpo", "on_the_way"), run("dpo", "before", **{"reference.precompute": True})
    for a, b in zip(metrics_of(on_the_way)[1:], metrics_of(before)[1:], strict=True):
        assert b["loss/total"] == pytest.approx(a["loss/total"], rel=1e-5)


@pytest.mark.slow
def test_a_stage_goes_on_from_an_adapter_and_measures_from_there(run: Run):
    first = run("sft", "first")
    given = {"model.adapter": {"path": str(first / "final")}}
    directory = run("grpo", "second", **given)
    lines = metrics_of(directory)[1:]
    assert lines[0]["kl/ref"] == pytest.approx(0.0, abs=1e-6)
    assert max(line["mismatch/logprob_abs_diff"] for line in lines) < 1e-5
    start, end = adapter_of(first), adapter_of(directory)
    assert start.keys() == end.keys()
    assert all(0 < (end[key] - start[key]).abs().max() < 0.2 for key in start)


@pytest.mark.ray
@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"model.dtype": "bfloat16"},
        {"trainer.engine": "deepspeed", "trainer.deepspeed.stage": 3},
        {"model.dtype": "bfloat16", "trainer.engine": "deepspeed", "trainer.deepspeed.stage": 3},
    ],
    ids=["fsdp", "fsdp-bfloat16", "ZeRO-3", "ZeRO-3-bfloat16"],
)
def test_two_ranks_train_the_adapter_that_one_trains(run_in_actors: Run, engine: dict[str, Any]):
    given = {"model.adapter.kind": "dora", "model.adapter.lora_plus_ratio": 4.0, **engine}
    one, two = run_in_actors("dpo", "one", **given), run_in_actors("dpo", "two", **given, **{"trainer.workers": 2})
    a, b = adapter_of(one), adapter_of(two)
    assert a.keys() == b.keys()
    assert {values.dtype for values in [*a.values(), *b.values()]} == {torch.float32}
    if "model.dtype" in engine:
        # Rounding in 16 bits depends on how sequences are packed, and Adam's first steps are as long for any gradient.
        one_b, two_b = (torch.cat([of[key].flatten() for key in sorted(of) if ".lora_B." in key]) for of in (a, b))
        assert torch.cosine_similarity(one_b, two_b, dim=0) > 0.9
        return
    for key, values in a.items():
        torch.testing.assert_close(b[key], values, rtol=1e-3, atol=1e-4)
