"""When a run gives up: too many failed rewards, too many skipped updates, nothing scored, nothing trained."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from counting_ranks import Ranks, learner_of, recipe_of

import rlflow
from rlflow.actors.trainer import UpdateStats
from rlflow.driver.errors import RunError
from rlflow.driver.learner import Learner
from rlflow.driver.rollout_report import RolloutReport
from rlflow.driver.run import _leaving_a_report
from rlflow.driver.untrained import why_nothing_was_trained
from rlflow.rewards.score_batch import ScoreBatch, ScoringError, told
from rlflow.tracking.report import write_report
from rlflow.tracking.rollouts import read_rollouts
from rlflow.types import Sample
from tests.local_actors import use_local_actors
from tests.report_pages import view_of

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


def report_of(failed: Sequence[bool]) -> RolloutReport:
    """Of groups of one rollout, on which the function ``judge`` failed or abstained, each scored in a call."""
    report = RolloutReport()
    for number, has_failed in enumerate(failed):
        errors = (ScoringError("judge", f"set:{number}", 0, 1, "raised"),) if has_failed else ()
        unscored = np.full(1, np.nan, np.float32)
        report.add(1, ScoreBatch({"judge": unscored}, {"judge": np.array([has_failed])}, {}, errors, 0.0))
    return report


def test_a_run_stops_above_the_limit_of_failed_rewards_and_not_at_it():
    half, more = report_of([True, True, False, False]), report_of([True, True, True, False])
    half.require_few_errors(0.5)
    with pytest.raises(RunError) as stopped:
        more.require_few_errors(0.5)
    assert str(stopped.value) == (
        "3 of 4 rollouts could not be scored, more than reward_server.max_error_fraction = 0.5:\n"
        "  reward 'judge', prompt 'set:0', row 0 and 2 more: it raised."
    )


def test_causes_are_told_once_each_with_how_many_rows_they_had():
    def error(prompt: str, num_rows: int, cause: str) -> ScoringError:
        return ScoringError("judge", prompt, 0, num_rows, cause)

    errors = [error("a", 1, "hung"), error("b", 2, "raised"), error("c", 3, "raised")]
    assert told(errors) == [
        "reward 'judge', prompt 'b', row 0 and 4 more: it raised.",
        "reward 'judge', prompt 'a', row 0: it hung.",
    ]
    assert told([error("a", 1, str(n)) for n in range(5)])[3:] == ["and 2 other causes"]


def update_all(learner: Learner, number: int, step: int) -> None:
    tokens, mask = np.zeros(2, np.int32), np.array([False, True])
    for _ in range(number):
        learner.update([Sample(tokens, mask, np.zeros(2, np.float32), np.ones(2, np.float32))], step)


@pytest.mark.parametrize("role", ["trainer", "critic"])
def test_a_run_stops_at_the_limit_of_skipped_updates_in_a_row(role: str):
    good, bad = UpdateStats(1.0, False), UpdateStats(float("nan"), True)
    scripts = {role: [bad, bad, good, bad, bad, bad]}
    ranks = {
        name: Ranks(1, {"forward_backward": lambda batches: {}}, scripts.get(name, ()))
        for name in ("trainer", "critic")
    }
    recipe = recipe_of("ppo", algorithm={"kl": {"coef": 0.0}}, run={"max_skipped_steps": 3})
    learner = learner_of(recipe, **ranks)
    update_all(learner, 5, 6)
    with pytest.raises(RunError, match=r"step 8: the gradient was not finite for 3 updates in a row.*learning_rate"):
        update_all(learner, 1, 7)


@pytest.mark.parametrize(
    ("norms", "has_trained"), [([0.0, 0.0], False), ([float("nan"), float("inf")], False), ([0.0, 1e-9, 0.0], True)]
)
def test_a_run_has_trained_when_one_update_had_a_gradient(norms: list[float], has_trained: bool):
    script = [UpdateStats(norm, not np.isfinite(norm)) for norm in norms]
    learner = learner_of(recipe_of("dapo"), trainer=Ranks(1, {"forward_backward": lambda batches: {}}, script))
    update_all(learner, len(norms), 0)
    assert learner.has_trained == has_trained


@pytest.mark.slow
def test_a_run_in_which_nothing_is_scored_stops_and_names_the_reward_that_abstained(run, tmp_path):
    with pytest.raises(RunError) as stopped:
        run("None", 9, **{"run.max_skipped_steps": 2})
    assert "step 2: none of its 8 rollouts has a reward: score abstained on 8. So it was in 2 steps" in str(
        stopped.value
    )
    assert "look at the columns that it reads" in str(stopped.value)
    log = (tmp_path / "out" / "logs" / "run.log").read_text()
    assert "step 1: none of its 8 rollouts has a reward: score abstained on 8. Nothing is trained in this step" in log


@pytest.mark.slow
@pytest.mark.parametrize("score", ["None", "1.0"])
def test_a_run_that_trained_nothing_is_no_success(run, tmp_path, score):
    """No reward at all in fewer steps than the limit, or the same one for everything."""
    with pytest.raises(RunError, match=f"nothing was trained, and {tmp_path}/out has no final/"):
        run(score, 2)
    assert (tmp_path / "out" / "report.html").is_file()
    with pytest.raises(RunError, match="nothing was trained"):
        run(score, 2, resume=True)
    assert not (tmp_path / "out" / "final").exists()


@pytest.mark.parametrize(
    ("name", "metrics", "says"),
    [
        ("sft", {}, r"No token was trained: look at data\.loss_on$"),
        ("grpo", {"completion/truncated_fraction": 0.4}, "No group had two different rewards: .* right at times$"),
        (
            "grpo",
            {"completion/truncated_fraction": 0.75},
            r"No group had .*\. 75% of the last step's completions were cut at their 7 tokens: raise rollout\.max_new",
        ),
        ("grpo", {"trainer/skipped": 1.0}, "the loss or its gradient was not finite: look at the weights"),
    ],
)
def test_what_may_have_been_the_matter_is_said_of_a_run_that_trained_nothing(
    name: str, metrics: dict[str, float], says: str
):
    assert re.search(says, why_nothing_was_trained(recipe_of(name, rollout={"max_new_tokens": 7}), metrics))


@pytest.mark.slow
def test_steps_without_a_reward_are_no_reason_to_stop_when_others_are_between_them(run):
    calls = "open(__file__ + '.calls', 'a+')"
    number = f"(lambda file: (file.write('x'), file.seek(0), len(file.read()))[-1])({calls})"
    score = f"None if ({number} - 1) // 8 % 2 == 0 else float(len(text) + ord((text + '?')[0]))"
    directory = run(score, 4, **{"run.max_skipped_steps": 2})
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["reward/unscored_fraction"] for line in lines[1:]] == [1.0, 0.0, 1.0, 0.0]
    assert (directory / "final").exists()


@pytest.mark.slow
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
    assert view_of(write_report(directory).read_text())["failures"] == [[cause, len(failed)]]


@pytest.mark.slow
def test_why_a_reward_failed_in_an_evaluation_is_told(run, tmp_path):
    evaluation = {"data": {"path": str(tmp_path / "rows.jsonl")}, "samples": 4, "temperature": 1.0}
    limit = {"reward_server.max_error_fraction": 0.99}
    directory = run("1 / (ord((text + '?')[0]) % 3)", 1, evaluation=evaluation, **limit)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    failed = round(16 * lines[0]["eval/heldout/unscored_fraction"])
    assert 0 < failed < 16
    told = f"evaluation heldout: {failed} of 16 completions could not be scored:\n  reward 'score', prompt 'rows:"
    assert told in (directory / "logs" / "run.log").read_text()


def test_a_report_that_cannot_be_written_is_told_of_and_ends_no_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "loss/sft": 0.5}\n')
    (tmp_path / ".report.html.writing").mkdir()
    told: list[str] = []
    recipe, tracker = recipe_of("sft", tracking=["jsonl"]), SimpleNamespace(message=told.append)
    with _leaving_a_report(recipe, tmp_path, tracker):
        pass
    assert len(told) == 1 and "the run is whole, but for its report" in told[0] and "report.html cannot be" in told[0]
