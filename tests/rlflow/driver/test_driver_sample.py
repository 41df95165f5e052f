"""Stages that sample: a tiny model answers, the good answers become rows, and the next stage learns from them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from finished_runs import RunRecipe, metrics_of
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import rlflow
from rlflow.data.errors import DataError
from rlflow.driver.errors import RunError, StopRequested
from rlflow.model_source import find_model
from rlflow.recipe import RecipeError
from rlflow.recipe.yaml_source import merge
from rlflow.tracking.rollouts import write_rollouts
from tests.actors.rollout_engines.http_stand_in import serving

pytestmark = pytest.mark.slow
REWARD = """
def first(completions, **columns):
    return [ord(text[0]) % 5 / 4 if text else None for text in completions]
"""
SAMPLE = {
    "name": "answers",
    "algorithm": {"name": "sample", "group_size": 16, "keep": {"where": "reward/first >= 0.5", "at_most": 2}},
    "data": {"prompts_per_step": 4},
    "run": {"epochs": 1},
}
SFT = {
    "name": "sft",
    "algorithm": {"name": "sft"},
    "data": {"train": {"stage": "answers"}, "prompts_per_step": 2},
    "trainer": {"learning_rate": 3e-3},
    "run": {"steps": 2},
}
Run = Callable[..., Path]


@pytest.fixture
def run(run_recipe: RunRecipe, tmp_path: Path, tiny_model_dir: Path) -> Run:
    """Runs the stage that samples, changed by ``blocks``, and the given ones behind it."""
    rows = tmp_path / "prompts.jsonl"
    asked = [{"id": f"q{i}", "prompt": f"{i}+1=", "response": "none", "topic": f"t{i}"} for i in range(10)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
    (tmp_path / "rewards.py").write_text(REWARD)
    shared = {
        "model": {"path": str(tiny_model_dir)},
        "data": {"train": {"path": str(rows)}, "max_prompt_tokens": 32, "max_tokens": 64},
        "rollout": {"engine": "torch", "max_new_tokens": 24},
    }
    scored = {"rewards": [{"plugin": f"{tmp_path / 'rewards.py'}:first"}]}

    def run(
        *behind: dict[str, Any],
        name: str = "run",
        resume: bool = False,
        before: dict[str, Any] | None = None,
        **blocks: Any,
    ) -> Path:
        own = {} if before is None else {"model": blocks.pop("model")}
        stages = [*([] if before is None else [before | own]), merge({**SAMPLE, **scored, **own}, blocks), *behind]
        return run_recipe({**shared, "stages": stages}, name, resume=resume)

    return run


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "answers" / "final" / "rows.jsonl").read_text().splitlines()]


def drawn(directory: Path) -> list[dict[str, Any]]:
    files = sorted((directory / "answers" / "rollouts").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_the_best_good_answers_of_each_prompt_become_rows_that_the_next_stage_learns_from(
    run: Run, tiny_model_dir: Path
):
    directory = run(SFT)
    answers = drawn(directory)
    assert len(answers) == 10 * 16
    assert len({row["prompt_id"] for row in answers}) == 10, "each prompt is answered once an epoch"
    assert {row["state"] for row in answers} == {"sampled"}
    expected: dict[str, list[tuple[float, str]]] = {}
    for row in answers:
        said = (row["reward"], row["completion"])
        is_good = row["finish_reason"] == "stop" and row["completion"].strip() and (row["reward"] or 0) >= 0.5
        if is_good and said not in expected.setdefault(row["prompt_id"], []):
            expected[row["prompt_id"]].append(said)
    best = {name: sorted(found, key=lambda said: -said[0])[:2] for name, found in expected.items()}
    rows = rows_of(directory)
    assert [(row["reward"], row["messages"][1]["content"]) for row in rows] == [
        said for found in best.values() for said in found
    ]
    assert len(rows) > 4
    for row in rows:
        assert row.keys() == {"topic", "messages", "prompt_id", "step", "reward"}
        assert row["messages"][0] == {"role": "user", "content": f"{row['topic'][1:]}+1="}
    trained = json.loads((directory / "sft" / "metrics.jsonl").read_text().splitlines()[-1])
    assert trained["step"] == 2 and trained["trainer/grad_norm"] > 0
    before, after = (load_file(place / "model.safetensors") for place in (tiny_model_dir, directory / "sft" / "final"))
    assert any((before[name] != after[name]).any() for name in before)
    assert find_model(str(directory)).directory == directory / "sft" / "final"
    with pytest.raises(DataError, match=r"answers has sampled answers and left no model: train on .*rows\.jsonl"):
        find_model(str(directory / "answers"))


def test_answers_are_of_the_model_that_the_stage_names(run: Run, tiny_teacher_dir: Path):
    """Not of the one that the stage behind it trains, and of no weights but those of its directory."""
    gkd = {"algorithm": {"name": "gkd", "distill": {"on_policy": 0.0}}, "teacher": {"path": str(tiny_teacher_dir)}}
    directory = run(
        SFT | gkd,
        model={"path": str(tiny_teacher_dir)},
        data={"train": {"rows": 2}},
        rewards=[],
        algorithm={"keep": {"where": None}},
    )
    compare_with_transformers(drawn(directory)[:8], tiny_teacher_dir)
    assert all(line["distill/divergence"] > 0 for line in metrics_of(directory / "sft")[1:])


def test_an_adapter_that_the_stage_before_has_trained_answers_with_its_base(run: Run, tiny_model_dir: Path):
    directory = run(
        model={"adapter": {"rank": 4}},
        before={**SFT, "data": {"prompts_per_step": 5}, "trainer": {"learning_rate": 0.05}},
        data={"train": {"rows": 3}},
        algorithm={"group_size": 4, "keep": {"where": None}},
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    compare_with_transformers(drawn(directory), PeftModel.from_pretrained(base, directory / "sft" / "final"))
    with pytest.raises(AssertionError):
        compare_with_transformers(drawn(directory), tiny_model_dir)


def compare_with_transformers(answers: list[dict[str, Any]], model: Any) -> None:
    """Each token has the logprob that the model gives it. ``model``: one, or its directory."""
    model = AutoModelForCausalLM.from_pretrained(model) if isinstance(model, Path) else model.eval()
    compared = 0
    for row in answers:
        prompt, said = row["prompt_token_ids"], row["token_ids"]
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        theirs = logprobs[torch.arange(len(said)), torch.tensor(said)].numpy()
        np.testing.assert_allclose(row["logprobs"], theirs, atol=1e-4)
        compared += len(said)
    assert compared > 20


def test_pairs_are_of_the_best_and_the_worst_answer_and_dpo_learns_from_them(run: Run):
    dpo = {**SFT, "name": "dpo", "algorithm": {"name": "dpo"}}
    directory = run(dpo, algorithm={"keep": {"form": "pairs", "where": None, "at_most": None}})
    rewards: dict[str, list[float]] = {}
    for row in drawn(directory):
        if row["finish_reason"] == "stop" and row["reward"] is not None and row["completion"].strip():
            rewards.setdefault(row["prompt_id"], []).append(row["reward"])
    differ = {name: (max(own), min(own)) for name, own in rewards.items() if max(own) > min(own)}
    rows = rows_of(directory)
    assert {row["prompt_id"]: (row["chosen_reward"], row["rejected_reward"]) for row in rows} == differ
    assert len(rows) == len(differ) > 4
    assert metrics_of(directory / "dpo")[-1]["trainer/grad_norm"] > 0


def test_a_stage_that_was_killed_draws_what_is_missing_and_keeps_the_same(run: Run):
    directory = run(SFT)
    before, rows = drawn(directory), (directory / "answers" / "final" / "rows.jsonl").read_bytes()
    weights = load_file(directory / "sft" / "final" / "model.safetensors")
    shutil.rmtree(directory / "answers" / "final")
    shutil.rmtree(directory / "sft")
    first, *later = sorted((directory / "answers" / "rollouts").glob("*.parquet"))
    for file in later:
        file.unlink()
    written = first.stat().st_mtime_ns
    assert run(SFT, resume=True) == directory
    assert first.stat().st_mtime_ns == written, "what was drawn is not drawn again"
    again = drawn(directory)
    assert [row["token_ids"] for row in again] == [row["token_ids"] for row in before]
    assert (directory / "answers" / "final" / "rows.jsonl").read_bytes() == rows
    assert [line["step"] for line in metrics_of(directory / "answers")] == [0, 1, 2, 3]
    after = load_file(directory / "sft" / "final" / "model.safetensors")
    assert all((weights[name] == after[name]).all() for name in weights)


def test_answers_of_two_temperatures_are_not_mixed_and_what_is_kept_may_change(run: Run):
    directory = run()
    shutil.rmtree(directory / "answers" / "final")
    with pytest.raises(DataError, match=r"rollout\.temperature was 1\.0, is 0\.5"):
        run(resume=True, rollout={"temperature": 0.5})
    num_rows = len([row for row in drawn(directory) if row["finish_reason"] == "stop" and row["completion"].strip()])
    run(resume=True, algorithm={"keep": {"where": None, "at_most": None}})
    assert 0 < len(rows_of(directory)) <= num_rows


def test_a_stage_that_keeps_nothing_says_so_and_the_next_does_not_start(run: Run, tmp_path: Path):
    with pytest.raises(RunError, match=r"160 answers, .* 0 good: 0 rows; nothing is kept"):
        run(SFT, algorithm={"keep": {"where": "reward > 1"}})
    assert not (tmp_path / "run" / "answers" / "final").exists() and not (tmp_path / "run" / "sft").exists()


@pytest.mark.parametrize(
    ("where", "says"),
    [("rewrd > 1", "did you mean 'reward'"), ("reward >", "is no condition"), ("reward/last > 0", "there is no")],
)
def test_a_condition_that_no_answer_can_fulfil_is_refused_before_anything_starts(
    run: Run, tmp_path: Path, where: str, says: str
):
    with pytest.raises(RecipeError, match=rf"algorithm\.keep\.where: .*{says}"):
        run(algorithm={"keep": {"where": where}})
    assert not (tmp_path / "run").exists()


def test_workers_that_go_on_while_a_step_is_awaited_draw_the_same_answers(run: Run):
    one, two = run(name="one"), run(name="two", run={"max_staleness": 2})
    assert [row["token_ids"] for row in drawn(one)] == [row["token_ids"] for row in drawn(two)]


def test_held_out_problems_are_measured_once_before(run: Run, tmp_path: Path):
    held_out = {"data": {"path": str(tmp_path / "prompts.jsonl"), "rows": 3}, "samples": 2, "temperature": 1.0}
    directory = run(evaluation={**held_out, "threshold": 0.5})
    first, *later = metrics_of(directory / "answers")
    assert 0 <= first["eval/heldout/pass@1"] <= 1 and not any("eval/heldout/pass@1" in line for line in later)


def test_plan_shows_the_stage_without_a_trainer(run: Run, tmp_path: Path, tiny_model_dir: Path):
    stages = [
        {**SAMPLE, "data": {"train": {"path": str(tmp_path / "prompts.jsonl")}}},
        {**SFT, "model": {"path": str(tiny_model_dir)}},
    ]
    stages[0]["algorithm"] = {"name": "sample"}
    sample, sft = rlflow.plan({"model": {"path": str(tiny_model_dir)}, "stages": stages})
    assert [planned.role.name for planned in sample.roles] == ["rollout", "rewards"]
    assert [planned.role.name for planned in sft.roles] == ["trainer"]
    assert "optimizer update" not in str(sample)


def test_a_servers_own_weights_answer_and_it_is_sent_none(run: Run, tiny_model_dir: Path):
    with serving(tiny_model_dir) as (server, url):
        server.engine.load_weights(AutoModelForCausalLM.from_pretrained(tiny_model_dir).named_parameters(), 0)
        served = {"rollout": {"engine": "http"}, "rollout_server": {"urls": [url]}}
        directory = run(data={"train": {"rows": 2}}, algorithm={"group_size": 4, "keep": {"where": None}}, **served)
    assert len(drawn(directory)) == 8
    assert any("completions" in path for path, _ in server.bodies)
    compare_with_transformers(drawn(directory), tiny_model_dir)
    assert not any("update" in path or "load" in path for path, _ in server.bodies)
    assert not (directory / "answers" / "served_weights").exists()


def test_a_stop_waits_for_the_answers_of_the_step_and_a_resumed_stage_goes_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written: list[Path] = []

    def write(path: Path, *content: Any) -> None:
        write_rollouts(path, *content)
        written.append(path)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("rlflow.driver.sample.write_rollouts", write)
    with pytest.raises(StopRequested, match="stopped after step 2 of 3"):
        run(SFT)
    directory = tmp_path / "run"
    assert not (directory / "answers" / "final").exists() and not (directory / "sft").exists()
    run(SFT, resume=True)
    assert len(written) == 3, "the last step alone was left"
    assert len(drawn(directory)) == 160 and rows_of(directory) and (directory / "sft" / "final").exists()
