"""What a stage's directory says of its end."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rlflow.driver.errors import RunError, StopRequested
from rlflow.driver.outcome import OUTCOME, forget_outcome, read_outcome, recording_outcome


@pytest.mark.parametrize(
    ("error", "ending", "message"),
    [
        (None, "finished", ""),
        (StopRequested("stopped after step 3"), "stopped", "stopped after step 3"),
        (KeyboardInterrupt(), "stopped", ""),
        (RunError("no gradient; api_key=abcdefghij"), "failed", "no gradient; api_key=***"),
        (ZeroDivisionError(), "failed", "ZeroDivisionError"),
    ],
)
def test_every_way_to_end_is_written_down_without_secrets(
    tmp_path: Path, error: BaseException | None, ending: str, message: str
):
    def stage() -> None:
        with recording_outcome(tmp_path):
            if error is not None:
                raise error

    if error is None:
        stage()
    else:
        with pytest.raises(type(error)):
            stage()
    outcome = read_outcome(tmp_path)
    assert outcome is not None and (outcome.ending, outcome.message) == (ending, message)
    assert abs(outcome.time - time.time()) < 60


@pytest.mark.parametrize("text", ["", "[]", '{"ending": "won", "message": "", "time": 0}', '{"ending": "failed"}'])
def test_a_damaged_outcome_counts_as_none(tmp_path: Path, text: str):
    (tmp_path / OUTCOME).write_text(text)
    assert read_outcome(tmp_path) is None


def test_a_disk_that_takes_no_word_changes_nothing_about_the_end(tmp_path: Path):
    with pytest.raises(RunError, match="the failure itself"), recording_outcome(tmp_path / "gone"):
        raise RunError("the failure itself")


def test_a_stage_that_goes_on_has_not_ended(tmp_path: Path):
    with pytest.raises(RunError), recording_outcome(tmp_path):
        raise RunError("an actor is gone")
    forget_outcome(tmp_path)
    assert read_outcome(tmp_path) is None
    forget_outcome(tmp_path)
