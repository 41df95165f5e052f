"""When a run gives up: too many failed rewards, too many skipped updates, nothing scored, nothing trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

import rlflow
from rlflow.driver.errors import RunError
from rlflow.driver.rollouts import RolloutTiming, ScoredChunk, require_few_errors
from rlflow.driver.stage import Stage
from rlflow.tracking.report import write_report
from rlflow.tracking.rollouts import read_rollouts
from rlflow.types import RolloutBatch, ScoreBatch
from tests.local_actors import use_local_actors

RECIPE = """
run: {{output_dir: {out}, seed: 3, steps: {steps}}}
model: {{path: {model}}}
algorithm: {{name: grpo, group_size: 4, kl: {{coef: 0.0}}}}
data: {{train: {{path: {rows}}}, prompts_per_step: 2, max_prompt_tokens: 32}}
rewards: [{{plugin: "{plugin}:score"}}]
rollout: {{engine: torch, max_new_tokens: 4}}
tracking: [jsonl]
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model_dir: Path) -> Callable[..., Path]:
    use_local_actors(monkeypatch)

    def run(score: str, steps: int, resume: bool = False, **overrides: Any) -> Path:
        """A run whose reward of each completion is the expression ``score`` of its ``text``."""
        rows, plugin, recipe = tmp_path / "rows.jsonl", tmp_path / "score.py", tmp_path / "recipe.yaml"
        rows.write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(4)))
        plugin.write_text(f"def score(completions, **columns):\n    return [{score} for text in completions]\n")
        given = {"out": tmp_path / "out", "model": tiny_model_dir, "rows": rows, "plugin": plugin, "steps": steps}
        recipe.write_text(RECIPE.format(**given))
        rlflow.run(recipe, overrides=overrides, resume=resume)
        return tmp_path / "out"

    return run


def timing_of(failed: Sequence[bool]) -> RolloutTiming:
    """Of one chunk, whose rows the function ``judge`` failed on or abstained on."""
    rows = len(failed)
    batch = RolloutBatch(
        np.zeros(rows, np.int32),
        np.zeros(rows, np.float32),
        np.arange(rows + 1),
        ("stop",) * rows,
        ("a",) * rows,
        0,
        1.0,
    )
    unscored = np.full(rows, np.nan, np.float32)
    scores = ScoreBatch({"judge": unscored}, {"judge": np.array(failed)}, {}, ("reward 'judge': it raised.",) * 2, 0.0)
    timing = RolloutTiming()
    timing.next_round()
    timing.add(ScoredChunk((), batch, scores))
    return timing


def test_a_run_stops_above_the_limit_of_failed_rewards_and_not_at_it():
    half, more = timing_of([True, True, False, False]), timing_of([True, True, True, False])
    require_few_errors(half, 0.5)
    with pytest.raises(RunError) as stopped:
        require_few_errors(more, 0.5)
    assert str(stopped.value) == (
        "3 of 4 rollouts could not be scored, more than reward_server.max_error_fraction = 0.5:\n"
        "  reward 'judge': it raised."
    )


def stage_with_limit(max_skipped_steps: int) -> Stage:
    return Stage(
        cast(Any, SimpleNamespace(run=SimpleNamespace(max_skipped_steps=max_skipped_steps))),
        Path("runs/x"),
        *cast(Any, [None] * 3),
        should_stop=lambda: False,
        clock=cast(Any, None),
    )


@pytest.mark.parametrize("role", ["trainer", "critic"])
def test_a_run_stops_at_the_limit_of_skipped_updates_in_a_row(role: str):
    good = {"trainer/skipped": 0.0, "critic/skipped": 0.0}
    bad = {**good, f"{role}/skipped": 1.0}
    stage = stage_with_limit(3)
    for metrics in (bad, bad, good, bad, bad):
        stage.count_skipped(metrics, 7)
    with pytest.raises(RunError, match=r"step 8: the gradient was not finite for 3 updates in a row.*learning_rate"):
        stage.count_skipped(bad, 8)


@pytest.mark.parametrize(
    ("norms", "has_trained"), [([0.0, 0.0], False), ([float("nan"), float("inf")], False), ([0.0, 1e-9, 0.0], True)]
)
def test_a_run_has_trained_when_one_update_had_a_gradient(norms: list[float], has_trained: bool):
    stage = stage_with_limit(9)
    for norm in norms:
        stage.count_skipped({"trainer/grad_norm": norm, "trainer/skipped": float(not np.isfinite(norm))}, 1)
    if has_trained:
        stage.require_trained()
    else:
        with pytest.raises(RunError, match="nothing was trained, and runs/x has no final/"):
            stage.require_trained()


def test_a_run_in_which_nothing_is_scored_stops_and_names_the_reward_that_abstained(run, tmp_path):
    with pytest.raises(RunError) as stopped:
        run("None", 9, **{"run.max_skipped_steps": 2})
    assert "step 2: none of its 8 rollouts has a reward: score abstained on 8. So it was in 2 steps" in str(
        stopped.value
    )
    assert "look at the columns that it reads" in str(stopped.value)
    log = (tmp_path / "out" / "logs" / "run.log").read_text()
    assert "step 1: none of its 8 rollouts has a reward: score abstained on 8. Nothing is trained in this step" in log


@pytest.mark.parametrize("score", ["None", "1.0"])
def test_a_run_that_trained_nothing_is_no_success(run, tmp_path, score):
    """No reward at all in fewer steps than the limit, or the same one for everything."""
    with pytest.raises(RunError, match="nothing was trained"):
        run(score, 2)
    with pytest.raises(RunError, match="nothing was trained"):
        run(score, 2, resume=True)
    assert not (tmp_path / "out" / "final").exists()


def test_steps_without_a_reward_are_no_reason_to_stop_when_others_are_between_them(run):
    calls = "open(__file__ + '.calls', 'a+')"
    number = f"(lambda file: (file.write('x'), file.seek(0), len(file.read()))[-1])({calls})"
    score = f"None if ({number} - 1) // 8 % 2 == 0 else float(len(text) + ord((text + '?')[0]))"
    directory = run(score, 4, **{"run.max_skipped_steps": 2})
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["reward/unscored_fraction"] for line in lines[1:]] == [1.0, 0.0, 1.0, 0.0]
    assert (directory / "final").exists()


def test_why_rewards_failed_is_told_below_the_limit_in_log_rollouts_report_and_on_standard_error(run, capsys):
    """One of the four samples of each prompt, more or less: whichever holds the letter."""
    directory = run("1 / (ord((text + '?')[0]) % 3)", 1, **{"reward_server.max_error_fraction": 0.99})
    (records,) = [read_rollouts(path) for path in directory.glob("rollouts/*.parquet")]
    failed = [record for record in records if record.error]
    assert 0 < len(failed) < 8
    cause = "score: it raised ZeroDivisionError: division by zero (score.py:2)"
    assert {record.error for record in failed} == {cause}
    assert all(np.isnan(record.reward) and record.state == "masked" for record in failed)
    told = f"step 1: {len(failed)} of 8 rollouts could not be scored:\n  reward 'score', prompt 'rows:"
    for text in (capsys.readouterr().err, (directory / "logs" / "run.log").read_text()):
        assert told in text and "it raised ZeroDivisionError: division by zero (score.py:2)." in text
    report = write_report(directory).read_text()
    assert "Why rewards failed" in report
    assert f'<td>{cause}</td><td class="num">{len(failed)}</td>' in report


def test_why_a_reward_failed_in_an_evaluation_is_told(run, tmp_path):
    evaluation = {"data": {"path": str(tmp_path / "rows.jsonl")}, "samples": 4, "temperature": 1.0}
    limit = {"reward_server.max_error_fraction": 0.99}
    directory = run("1 / (ord((text + '?')[0]) % 3)", 1, evaluation=evaluation, **limit)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    failed = round(16 * lines[0]["eval/heldout/unscored_fraction"])
    assert 0 < failed < 16
    told = f"evaluation heldout: {failed} of 16 completions could not be scored:\n  reward 'score', prompt 'rows:"
    assert told in (directory / "logs" / "run.log").read_text()
