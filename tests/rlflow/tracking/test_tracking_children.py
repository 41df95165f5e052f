"""A tracker in a real process of its own, with a real wandb; no network."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlflow.recipe import Recipe
from rlflow.tracking import child_tracker
from rlflow.tracking.child_tracker import ChildTracker
from rlflow.tracking.experiment import arguments_of, wandb_mode
from rlflow.types import StepStats


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def start(recipe: Recipe, directory: Path, say: Callable[[str], None], *, finish_seconds: float = 60) -> ChildTracker:
    arguments = arguments_of("wandb", recipe, directory)
    log = directory / "logs" / "wandb.log"
    return ChildTracker("wandb", arguments, log, say=say, finish_seconds=finish_seconds)


def written(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.rglob("*.wandb"))


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_without_a_key_the_run_is_offline_in_its_directory_and_holds_no_secret(
    tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    said: list[str] = []
    tracker = start(make_recipe(), tmp_path, said.append)
    for step in range(1, 21):
        tracker.log(StepStats(step, {"reward/mean": step / 20, "loss/total": float("nan")}))
    tracker.finish({"best/pass@1": 0.5})
    tracker.close()
    assert len(said) == 1 and said[0].startswith("wandb: offline; `wandb sync ")
    content = written(tmp_path)
    assert b"reward/mean" in content and b"best/pass@1" in content and b"math_accuracy" in content
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"hunter2-secret" not in everything


@pytest.mark.slow
def test_a_resumed_run_keeps_its_id(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    for step in (1, 2):
        tracker = start(make_recipe(), tmp_path, print)
        tracker.log(StepStats(step, {"reward/mean": 0.0}))
        tracker.finish({})
    # offline-run-<date>_<time>-<id>, and a number behind the second of one second
    runs = [path.name.split("-")[3] for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert set(runs) == {(tmp_path / "wandb" / "run_id").read_text().strip()}


def test_a_killed_process_costs_one_notice_and_is_not_waited_for(
    tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    said: list[str] = []
    tracker = start(make_recipe(), tmp_path, said.append, finish_seconds=3600)
    process = tracker._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for step in range(3):
        tracker.log(StepStats(step, {"reward/mean": 0.0}))
    tracker.finish({})
    assert len(said) == 1 and "ended early" in said[0]


@pytest.mark.slow
def test_an_unreachable_service_is_waited_for_no_longer_than_the_deadline(
    tmp_path: Path, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    said: list[str] = []
    tracker = start(make_recipe(), tmp_path, said.append, finish_seconds=1.0)
    process = tracker._process
    assert process is not None
    waited: list[float | None] = []
    wait = process.wait
    monkeypatch.setattr(process, "wait", lambda timeout=None: waited.append(timeout) or wait(timeout))
    tracker.log(StepStats(1, {"reward/mean": 0.0}))
    tracker.finish({})
    assert "did not finish within 1 s" in said[-1]
    # Once for what is left of the deadline, then for the process that was killed.
    assert waited[0] is not None and waited[0] <= 1.0 and waited[1:] == [None]
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_child_that_does_not_read_loses_steps_which_are_counted(
    tmp_path: Path, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_tracker, "BACKLOG_BYTES", 10_000)
    said: list[str] = []
    tracker = start(make_recipe(), tmp_path, said.append)
    process = tracker._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    big = {f"group/metric_{i}": 0.123456789 for i in range(100)}
    for step in range(100):
        tracker.log(StepStats(step, big))  # returns although nobody reads
    dropped = tracker.dropped
    assert 50 < dropped < 100
    os.kill(process.pid, signal.SIGCONT)

    def drained() -> bool:
        tracker._write()
        return not tracker._backlog

    wait_until(drained)
    tracker.log(StepStats(100, {"reward/mean": 1.0}))
    tracker.finish({})
    assert said[0].startswith("wandb is too slow") and said[-1].startswith(f"wandb was too slow for {dropped} steps")
    assert b"tracking/wandb_dropped_steps" in written(tmp_path)


@pytest.mark.parametrize(
    ("environ", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "k"}, None),
        ({"WANDB_MODE": "disabled"}, None),
        ({"WANDB_BASE_URL": "https://wandb.example.org"}, None),
        ({"WANDB_BASE_URL": "https://other.example.org"}, "offline"),
    ],
)
def test_a_key_is_looked_for_in_the_environment_and_netrc(
    tmp_path: Path, environ: dict[str, str], mode: str | None
) -> None:
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password k\n")
    assert wandb_mode(environ | {"NETRC": str(tmp_path / "netrc")}) == mode


def test_a_broken_netrc_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine\n")
    assert wandb_mode({"NETRC": str(tmp_path / "netrc")}) == "offline"
