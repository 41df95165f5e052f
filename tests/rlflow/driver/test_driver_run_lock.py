"""Who may have a run's directory, and that a user's own folder is never touched."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlflow.data.errors import DataError
from rlflow.driver.directory import RunDirectory, directory_problem, prepare_directory
from rlflow.driver.errors import RunError
from rlflow.driver.resuming import Inputs
from rlflow.driver.run_lock import LOCK, RunLock
from rlflow.recipe import Recipe

HOLD = """
import sys, time
from pathlib import Path
from rlflow.driver.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take()
print("taken", flush=True)
time.sleep(120)
"""


def recipe_of(directory: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "algorithm": {"name": "sft"},
            "run": {"output_dir": str(directory), "steps": 1},
            "data": {"train": {"path": "rows.jsonl"}},
            "model": {"path": "org/model"},
        }
    )


def prepare(directory: Path, *, resume: bool = False) -> RunDirectory:
    return prepare_directory(recipe_of(directory), Inputs({}, {}, {}), resume=resume)


def test_a_directory_has_one_run_until_its_process_is_gone(tmp_path: Path):
    directory = tmp_path / "runs" / "a"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(directory)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "taken\n"
        other = RunLock(directory)
        says = rf"runs/a is in use by process {process.pid} on {socket.gethostname()}, since .*another run.output_dir"
        with pytest.raises(RunError, match=says):
            other.take()
        other.release()
        assert (directory / LOCK).exists()
    finally:
        process.kill()
        process.wait()
    other.take()
    assert other.left_by is not None and other.left_by.pid == process.pid
    assert json.loads((directory / LOCK).read_text())["pid"] == os.getpid()
    other.release()
    assert list(directory.iterdir()) == []


def test_what_the_lock_has_made_goes_with_it_unless_somebody_filled_it(tmp_path: Path):
    lock = RunLock(tmp_path / "runs" / "a")
    lock.take()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    lock.take()
    (tmp_path / "runs" / "b").mkdir()
    lock.release()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["b"]


def test_where_the_file_system_has_no_locks_the_file_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.take()
    with pytest.raises(RunError, match="is in use by process"):
        second.take()
    said = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps({**said, "began": "1"}))
    second.take()
    (tmp_path / LOCK).write_text(json.dumps({**said, "host": "elsewhere", "began": "1"}))
    with pytest.raises(RunError, match=r"on elsewhere, .*remove .*rlflow.lock where it is gone"):
        first.take()


def test_a_lock_file_that_says_nothing_is_taken_over(tmp_path: Path):
    (tmp_path / LOCK).write_text("{")
    lock = RunLock(tmp_path)
    lock.take()
    assert lock.left_by is None


def test_an_earlier_run_moves_aside_and_the_lock_stays_with_the_name(tmp_path: Path):
    directory = tmp_path / "run"
    prepare(directory)
    (directory / "metrics.jsonl").write_text("{}")
    lock = RunLock(directory)
    lock.take()
    second = prepare(directory)
    assert second.notes == (f"{directory} held an earlier run, which is now {tmp_path / 'run.1'}",)
    assert (tmp_path / "run.1" / "metrics.jsonl").exists() and not (tmp_path / "run.1" / LOCK).exists()
    with pytest.raises(RunError, match="is in use"):
        RunLock(directory).take()
    second.discard()
    assert (directory / "metrics.jsonl").exists() and not (tmp_path / "run.1").exists()


def test_a_run_that_cannot_start_leaves_an_empty_directory_as_it_was(tmp_path: Path):
    (tmp_path / "run").mkdir()
    prepared = prepare(tmp_path / "run")
    assert prepared.is_new and prepared.aside is None
    prepared.discard()
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_of_the_users_own_is_refused_and_stays(tmp_path: Path, resume: bool):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("years of work")
    (folder / "recipe.yaml").write_text("algorithm: {name: sft}\nrun: {output_dir: .}\n")
    with pytest.raises(DataError, match=r"thesis is not empty and no run of rlflow's \(it holds chapter.tex, recipe"):
        prepare(folder, resume=resume)
    assert sorted(path.name for path in folder.iterdir()) == ["chapter.tex", "recipe.yaml"]
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


def test_the_current_directory_and_those_around_it_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for path in (here, tmp_path, Path("/")):
        assert "is the current directory or one around it" in str(directory_problem(path))
    assert directory_problem(here / "run") is None


def test_a_run_may_be_resumed_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prepare(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    assert directory_problem(tmp_path / "run", resume=True) is None
    assert directory_problem(tmp_path / "run") is not None
