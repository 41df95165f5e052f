from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlflow.recipe import Recipe
from rlflow.tracking import make_tracker
from rlflow.tracking.tracker import Tracker, Trackers
from rlflow.types import StepStats


def test_console_and_file_hear_the_same(
    tmp_path: Path, make_recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = make_tracker(make_recipe(tracking=["console", "jsonl"]), tmp_path, resumed_at=0)
    tracker.message("loading from https://me:hunter2@host/model")
    tracker.progress("generating", 1, 2)
    tracker.log(StepStats(1, {"loss/total": 0.5}))
    tracker.finish({})
    tracker.close()
    tracker.close()
    out = capsys.readouterr().out
    assert "https://***@host/model" in out and "hunter2" not in out
    assert "step  1/20  loss 0.500" in out
    assert '"loss/total": 0.5' in (tmp_path / "metrics.jsonl").read_text()


def test_a_resumed_console_remembers_the_first_evaluation(
    tmp_path: Path, make_recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    for step, value in ((0, 0.25), (5, 0.5)):
        tracker = make_tracker(make_recipe(), tmp_path)
        tracker.log(StepStats(step, {"eval/heldout/pass@1": value}))
        tracker.close()
    assert "pass@1 0.500 (+0.250)" in capsys.readouterr().out


def test_without_console_messages_go_to_standard_error(
    tmp_path: Path, make_recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = make_tracker(make_recipe(tracking=["jsonl"]), tmp_path)
    tracker.message("checkpoint step_000010 is damaged")
    tracker.finish({})
    assert capsys.readouterr() == ("", "rlflow: checkpoint step_000010 is damaged\n")


def test_every_tracker_is_closed_when_one_of_them_fails() -> None:
    closed = []

    class Failing(Tracker):
        def close(self) -> None:
            raise OSError("disk full")

    class Closing(Tracker):
        def close(self) -> None:
            closed.append(self)

    with pytest.raises(OSError, match="disk full"):
        Trackers([Closing(), Failing(), Closing()]).close()
    assert len(closed) == 2


@pytest.mark.slow
def test_the_driver_side_imports_neither_wandb_nor_torch() -> None:
    modules = "rlflow.tracking, rlflow.tracking.console, rlflow.tracking.child_tracker, rlflow.tracking.rollouts"
    heavy = "[name for name in ('wandb', 'torch', 'vllm', 'transformers', 'ray') if name in sys.modules]"
    code = f"import sys, {modules}, rlflow.tracking.report; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
