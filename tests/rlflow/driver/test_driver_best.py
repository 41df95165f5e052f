"""Which checkpoint is the best, and when the evaluation ends a stage: also across a resume. Scores are scripted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from finished_runs import NEW_MODEL, RunRecipe, as_if_killed_after, steps_of

from rlflow.actors.trainer import Measured
from rlflow.driver.learner import Learner
from rlflow.driver.pass_evaluation import PassEvaluator

pytestmark = pytest.mark.slow

SHARED: dict[str, Any] = {
    "model": NEW_MODEL,
    "algorithm": {"name": "sft"},
    "data": {"train": {"generator": "arithmetic", "args": {"digits": 1}}, "prompts_per_step": 4, "max_tokens": 32},
}
HELDOUT = {"generator": "arithmetic", "args": {"digits": 1, "split": "heldout"}, "rows": 2}

Run = Callable[..., Path]


@pytest.fixture
def run(run_recipe: RunRecipe) -> Run:
    def make(resume: bool = False, *, evaluation: dict[str, Any], **run_block: Any) -> Path:
        block = {"steps": 4, "save_every": 1, "keep_checkpoints": 9, **run_block}
        recipe = {**SHARED, "run": block, "evaluation": {"data": HELDOUT, "every": 1, **evaluation}}
        if "reward" in evaluation:
            recipe["data"] = {**SHARED["data"], "max_prompt_tokens": 16}
            recipe["rollout"] = {"engine": "torch", "max_new_tokens": 4}
        return run_recipe(recipe, resume=resume)

    return make


def script_losses(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """What evaluations measure, from that before the first step on."""
    left: Iterator[float] = iter(losses)
    monkeypatch.setattr(Learner, "evaluate", lambda *_: Measured(next(left), {}))


def script_passes(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    left: Iterator[float] = iter(scores)
    monkeypatch.setattr(PassEvaluator, "measure", lambda evaluator: {evaluator.metric: next(left)})


def best_of(directory: Path) -> str:
    return (directory / "checkpoints" / "best").readlink().name


def test_the_best_checkpoint_has_the_least_held_out_loss(run: Run, monkeypatch):
    script_losses(monkeypatch, [9.0, 3.0, 1.0, 2.0, 4.0])
    assert best_of(run(evaluation={})) == "step_000002"


def test_the_best_checkpoint_has_the_most_passes(run: Run, monkeypatch):
    script_passes(monkeypatch, [0.0, 0.25, 0.5, 0.75, 0.5])
    assert best_of(run(evaluation={"reward": {"name": "exact_match"}})) == "step_000003"


@pytest.mark.parametrize(("losses", "best"), [([2.0, 3.0], "step_000002"), ([2.0, 0.5], "step_000004")])
def test_the_best_of_before_counts_when_a_run_is_resumed(run: Run, monkeypatch, losses: list[float], best: str):
    script_losses(monkeypatch, [9.0, 3.0, 1.0])
    directory = run(evaluation={}, steps=2)
    as_if_killed_after(directory, 2)
    script_losses(monkeypatch, losses)
    assert best_of(run(resume=True, evaluation={})) == best


def test_scores_of_another_evaluation_are_not_compared_with_those_of_before(run: Run, monkeypatch, capsys):
    script_losses(monkeypatch, [9.0, 3.0, 1.0])
    as_if_killed_after(run(evaluation={}, steps=2), 2)
    script_losses(monkeypatch, [5.0, 6.0])
    directory = run(resume=True, evaluation={"data": {**HELDOUT, "args": {"digits": 1}}})
    assert best_of(directory) == "step_000003"
    said = capsys.readouterr().err
    assert "evaluation.data has other rows" in said and "the best checkpoint is looked for anew" in said


def test_a_stage_that_reached_its_score_is_over_when_it_is_resumed(run: Run, monkeypatch):
    evaluation = {"reward": {"name": "exact_match"}}
    script_passes(monkeypatch, [0.0, 0.25, 0.5])
    directory = run(evaluation=evaluation, stop_at_score=0.5)
    assert steps_of(directory) == [0, 1, 2]
    shutil.rmtree(directory / "final")
    run(resume=True, evaluation=evaluation, stop_at_score=0.5)
    assert steps_of(directory) == [0, 1, 2] and (directory / "final" / "config.json").exists()


def test_a_stage_that_reached_its_score_goes_on_to_a_higher_one(run: Run, monkeypatch):
    evaluation = {"reward": {"name": "exact_match"}}
    script_passes(monkeypatch, [0.0, 0.5, 0.75, 1.0])
    directory = run(evaluation=evaluation, stop_at_score=0.5)
    assert steps_of(directory) == [0, 1]
    run(resume=True, evaluation=evaluation, stop_at_score=0.75)
    assert steps_of(directory) == [0, 1, 2]
    run(resume=True, evaluation=evaluation, stop_at_score=0.75)
    assert steps_of(directory) == [0, 1, 2]
