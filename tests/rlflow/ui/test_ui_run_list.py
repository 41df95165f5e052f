"""What the list says of each run, and that it is there at once."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from ui_server import write_lock, write_run

from rlflow.driver.outcome import write_outcome
from rlflow.ui.run_list import RunList
from rlflow.ui.run_rows import rows_behind, sample_rows, tail_rows
from rlflow.ui.served import Served


def card(root: Path, name: str) -> dict:
    return RunList(Served(root)).card(name)


def test_a_run_at_work_has_its_step_the_time_that_is_left_and_a_curve(tmp_path: Path):
    run = write_run(tmp_path / "a", 40, of=100)
    write_lock(run, os.getpid())
    shown = card(tmp_path, "a")
    assert (shown["state"], shown["step"], shown["steps"], shown["algorithm"]) == ("running", 40, 100, "grpo")
    assert shown["eta_s"] == pytest.approx(60 * 2)
    assert shown["headline"] == "reward/mean" and shown["values"][0] == 0.1 and shown["values"][-1] == 4.0
    assert list(shown["values"]) == sorted(shown["values"]) and 20 <= len(shown["values"]) <= 40


def test_the_time_that_is_left_knows_evaluations_and_no_pauses(tmp_path: Path):
    run = write_run(tmp_path / "a", 0, of=26)
    write_lock(run, os.getpid())
    seconds = [*[1.0] * 5, 500.0, *[1.0] * 7, 8.0]
    rows = [{"step": n, "time": 10_000 * n, "time/step_s": taken} for n, taken in enumerate(seconds, start=1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert card(tmp_path, "a")["eta_s"] == pytest.approx(12 * (12 * 1.0 + 8.0) / 13)


def test_a_run_that_ended_says_how_and_why(tmp_path: Path):
    for ending, message in (("finished", ""), ("stopped", "stopped after step 3"), ("failed", "out of memory")):
        run = write_run(tmp_path / ending, 3)
        write_outcome(run, ending, message)
        shown = card(tmp_path, ending)
        assert (shown["state"], shown["message"], shown["eta_s"]) == (ending, message, None)


def test_a_run_of_another_machine_is_not_ours_to_stop_and_may_be_resumed_where_that_is_gone(tmp_path: Path):
    run = write_run(tmp_path / "a", 3)
    write_lock(run, os.getpid())
    lock = json.loads((run / ".rlflow.lock").read_text())
    (run / ".rlflow.lock").write_text(json.dumps({**lock, "host": "a-container-that-was-made-anew"}))
    shown = card(tmp_path, "a")
    assert (shown["state"], shown["can_stop"], shown["can_resume"]) == ("running", False, True)


def test_a_run_that_was_killed_has_failed_although_it_was_stopped_well_before(tmp_path: Path):
    run = write_run(tmp_path / "a", 3)
    write_outcome(run, "stopped", "")
    os.utime(run / "outcome.json", (1, 1))
    write_lock(run, os.getpid(), began="another process's")
    assert card(tmp_path, "a")["state"] == "failed"


def test_a_stage_that_is_done_is_finished_while_its_process_is_at_work_on_the_next(tmp_path: Path):
    first, second = write_run(tmp_path / "x" / "sft", 3), tmp_path / "x" / "grpo"
    second.mkdir()
    for run in (first, second):
        write_lock(run, os.getpid())
        os.utime(run / ".rlflow.lock", (1, 1))
    write_outcome(first, "finished")
    assert [card(tmp_path, f"x/{name}")["state"] for name in ("sft", "grpo")] == ["finished", "starting"]
    os.utime(first / ".rlflow.lock")
    os.utime(first / "outcome.json", (1, 1))
    assert card(tmp_path, "x/sft")["state"] == "running", "a finished stage that is given more steps is at work again"


@pytest.mark.parametrize(("saved", "state"), [(5, "stopped"), (4, "failed"), (None, "failed")])
def test_a_run_of_a_version_without_outcomes_is_judged_by_its_checkpoint(tmp_path: Path, saved: int | None, state: str):
    run = write_run(tmp_path / "a", 5)
    if saved is not None:
        (run / "checkpoints" / f"step_{saved:06d}").mkdir(parents=True)
    assert card(tmp_path, "a")["state"] == state
    (run / "final").mkdir()
    assert card(tmp_path, "a")["state"] == "finished"


def test_runs_are_found_below_and_links_and_what_is_in_a_run_are_not_followed(tmp_path: Path):
    root, outside = tmp_path / "runs", write_run(tmp_path / "outside", 1)
    write_run(root / "a" / "sft", 1)
    write_run(root / "b", 1)
    write_run(root / "b" / "old", 1)
    write_run(root / ".hidden", 1)
    (root / "linked").symlink_to(outside)
    assert Served(root).run_names() == ["a/sft", "b"]
    assert Served(root / "b").run_names() == ["."]


def test_a_run_is_read_again_only_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = write_run(tmp_path / "a", 5)
    runs = RunList(Served(tmp_path))
    assert [one["step"] for one in runs.cards()] == [5]
    read = []
    monkeypatch.setattr("rlflow.ui.run_list.tail_rows", lambda path: read.append(path) or tail_rows(path))
    runs.cards()
    assert read == []
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "time": time.time()}) + "\n")
    assert [one["step"] for one in runs.cards()] == [6] and len(read) == 1


@pytest.mark.slow
def test_two_hundred_runs_of_a_thousand_steps_are_listed_in_under_a_second_of_cpu(tmp_path: Path):
    extra = {f"metric/{n}": n / 7 for n in range(60)}
    text = "".join(
        json.dumps({"step": n, "time": n * 2.0, "reward/mean": n / 10, **extra}) + "\n" for n in range(1, 1001)
    )
    first = write_run(tmp_path / "0", 1, of=1000)
    (first / "metrics.jsonl").write_text(text)
    for n in range(1, 200):
        run = tmp_path / str(n)
        run.mkdir()
        for name in ("metrics.jsonl", "recipe.yaml"):
            os.link(first / name, run / name)
    runs, begun = RunList(Served(tmp_path)), time.process_time()
    cards = runs.cards()
    assert time.process_time() - begun < 1.0
    assert len(cards) == 200 and {one["step"] for one in cards} == {1000}
    begun = time.process_time()
    runs.cards()
    assert time.process_time() - begun < 0.3


def test_lines_are_sampled_over_a_file_whatever_their_length(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    long = {"step": 2, "pad": "x" * 100_000}
    rows = [{"step": 1}, long, *({"step": n} for n in range(3, 500))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 500, "cut sh')
    steps = [row["step"] for row in sample_rows(path, 30)]
    assert steps[0] == 1 and steps[-1] == 499 and steps == sorted(set(steps))
    assert tail_rows(path)[-1]["step"] == 499
    path.write_text(json.dumps({"step": 7, "pad": "x" * 200_000}) + "\n")
    assert [row["step"] for row in sample_rows(path, 30)] == [7] == [row["step"] for row in tail_rows(path)]
    path.write_text("no JSON\n[1]\n" + '{"step": "x"}\n')
    assert sample_rows(path, 5) == [] == tail_rows(path)


def test_only_what_came_since_is_read_and_a_file_that_was_replaced_is_read_anew(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 10.5, "a": 1.23456789}\n{"step": 2, "a": null}\n{"step": 3, "b": 1')
    first = rows_behind(path, 0, "")
    assert (first.steps, first.times, first.is_anew) == ([1, 2], [10.5, None], True)
    assert first.metrics == {"a": [1.23457, None]}
    with path.open("a") as file:
        file.write('0}\n{"step": 3, "a": 2}\n')
    then = rows_behind(path, first.offset, first.file)
    assert (then.steps, then.metrics, then.is_anew) == ([3], {"b": [10.0], "a": [2.0]}, False)
    assert rows_behind(path, then.offset, then.file).steps == []
    resumed = tmp_path / "new"
    resumed.write_text('{"step": 1}\n')
    resumed.rename(path)
    assert rows_behind(path, then.offset, then.file).is_anew
