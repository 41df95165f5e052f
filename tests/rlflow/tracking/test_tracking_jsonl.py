from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from rlflow.tracking.jsonl import JsonlTracker, keep_before, read_metrics
from rlflow.types import StepStats
from rlflow.ui.run_rows import tail_rows


def log(path: Path, steps: range) -> None:
    tracker = JsonlTracker(path)
    for step in steps:
        tracker.log(StepStats(step, {"loss/total": step / 2}))
    tracker.close()
    tracker.close()


def without_time(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]


def test_a_step_is_one_line_that_can_be_read_at_once(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log(StepStats(3, {"loss/total": np.float64(0.5), "reward/mean": 1}))
    assert without_time(tmp_path / "metrics.jsonl") == [{"step": 3, "loss/total": 0.5, "reward/mean": 1.0}]


def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log(StepStats(1, {"a": math.nan, "b": math.inf, "c": -math.inf}))
    assert without_time(path) == [{"step": 1, "a": None, "b": None, "c": None}]
    assert math.isnan(read_metrics(path)[0]["b"])


@pytest.mark.parametrize("resumed_at", [0, 1, 4, 9])
def test_a_resumed_run_leaves_the_file_of_one_never_stopped(tmp_path: Path, resumed_at: int) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    log(whole, range(0, 10))
    log(resumed, range(0, 7))
    with resumed.open("a") as file:
        file.write('{"step": 7, "los')
    log(resumed, range(min(resumed_at, 6) + 1, 10))
    assert without_time(resumed) == without_time(whole)
    assert sorted(os.listdir(tmp_path)) == ["resumed.jsonl", "whole.jsonl"]


def test_a_run_that_starts_over_replaces_its_first_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, range(0, 3))
    log(path, range(0, 1))
    assert without_time(path) == [{"step": 0, "loss/total": 0.0}]


def test_cutting_leaves_a_file_without_later_lines_untouched(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, range(0, 3))
    before = path.stat()
    keep_before(path, 3)
    assert path.stat().st_ino == before.st_ino
    keep_before(path, 2)
    assert [row["step"] for row in read_metrics(path)] == [0, 1]


def test_lines_of_one_step_are_merged_and_broken_lines_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 1, "a": 2, "b": 3}\nnonsense\n[1]\n{"step": 2, "a": 4}\n{"step": 3')
    assert read_metrics(path) == [{"step": 1, "a": 2, "b": 3}, {"step": 2, "a": 4}]


def test_a_full_disk_is_an_error_that_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, range(0, 2))
    real_open = Path.open

    def open_full(self: Path, mode: str = "r", **options: Any) -> IO:
        return real_open(Path("/dev/full") if mode == "ab" else self, mode, **options)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(OSError, match="No space left"):
        JsonlTracker(path).log(StepStats(2, {"a": 1.0}))
    assert [row["step"] for row in read_metrics(path)] == [0, 1]


def test_lines_of_others_are_no_steps_and_numbers_beyond_all_floats_are_infinite(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    odd = ["null", "[" * 100_000, '{"step": 1e400}', '{"step": true}', '{"step": 1' + "0" * 400 + "}", '{"step": "2"}']
    path.write_text("\n".join([*odd, '{"step": 3, "a": 1' + "0" * 400 + "}", ""]))
    assert read_metrics(path) == [{"step": 3, "a": math.inf}]
    # The same lines are steps for the list of runs, which one run's file may not hide.
    assert tail_rows(path) == [{"step": 3, "a": math.inf}]
