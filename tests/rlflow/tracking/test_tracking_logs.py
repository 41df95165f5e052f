"""Actors' logs: written by a real process from another real process's output, read back, found, followed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlflow.cli.main import main
from rlflow.tracking import log_process, logs
from rlflow.tracking.history import HistoryError
from rlflow.tracking.log_process import Log, readable_line
from rlflow.tracking.logs import choose_logs, find_logs, follow, last_lines, last_words, log_path

ACTOR = """
import os, signal, subprocess, sys
from pathlib import Path
from rlflow.tracking.logs import send_output_to
send_output_to(Path(sys.argv[1]), "rollout[0]", ["hunter2-secret"])
print("from Python, with hunter2-secret and", os.environ["MY_API_KEY"])
subprocess.run(["sh", "-c", "echo from a child >&2"], check=True)
os.write(2, b"loading  10%\\rloading 100%\\n\\x1b[31mred\\x1b[0m\\n")
print(sys.argv[2], end="", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def run_actor(path: Path, words: str) -> None:
    environment = os.environ | {"MY_API_KEY": "key-of-the-environment"}
    done = subprocess.run([sys.executable, "-c", ACTOR, str(path), words], env=environment, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (-9, b"", b"")


def test_what_an_actor_and_its_children_print_is_in_its_log_up_to_the_last_words_before_a_kill(tmp_path: Path) -> None:
    path = log_path(tmp_path / "logs", "rollout[0]")
    run_actor(path, "first words")
    said = last_words(path, wait_s=20)
    lines = path.read_text().splitlines()
    assert path == tmp_path / "logs" / "rollout-0.log"
    assert lines[0].startswith("=== ") and lines[0].endswith(" starts") and ": process " in lines[0]
    assert lines[1:-1] == [
        "from Python, with *** and ***",
        "from a child",
        "loading 100%",
        "red",
        "first words",
    ]
    assert said == f"{path} ends with:" + "".join(f"\n    {line}" for line in lines[1:-1])


@pytest.mark.slow
def test_an_actor_that_is_started_again_goes_on_in_its_log_and_the_last_words_are_its_own(tmp_path: Path) -> None:
    path = tmp_path / "rollout-0.log"
    run_actor(path, "first words")
    last_words(path, wait_s=20)
    run_actor(path, "second words")
    said = last_words(path, wait_s=20)
    assert "second words" in said and "first words" not in said
    assert path.read_text().index("first words") < path.read_text().index("second words")


def test_a_log_that_cannot_be_written_leaves_output_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file\n")
    code = (
        "import sys; from pathlib import Path; from rlflow.tracking.logs import send_output_to\n"
        "send_output_to(Path(sys.argv[1]), 'trainer[0]', [])\nprint('goes on')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "logs" / "trainer-0.log")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "goes on\n"
    assert "trainer[0]: " in done.stderr and "cannot be written" in done.stderr


def test_a_log_that_is_too_large_begins_anew_and_keeps_what_was_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_process, "LARGEST_BYTES", 100)
    log = Log(tmp_path / "a.log", str.upper)
    for number in range(30):
        log.write(f"line {number}\n".encode())
    before, now = (tmp_path / "a.log.1").read_text(), (tmp_path / "a.log").read_text()
    assert now.endswith("LINE 29\n") and len(before) <= 110
    assert before + now == "".join(f"LINE {number}\n" for number in range(30))[-len(before + now) :]


def test_lines_by_which_ray_marks_actors_are_left_out(tmp_path: Path) -> None:
    Log(tmp_path / "a.log", str).write(b":actor_name:RolloutWorker\nhello\n:job_id:01000000\n")
    assert (tmp_path / "a.log").read_text() == "hello\n"


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ("plain\ttext", "plain\ttext"),
        ("ends for Windows\r", "ends for Windows"),
        ("10%\r 50%\r100%", "100%"),
        ("\x1b[1;32mgreen\x1b[0m \x1b]0;title\x07done", "green done"),
        ("bell \x07 and \x00", "bell ? and ?"),
    ],
)
def test_a_line_is_what_a_terminal_would_show_in_the_end(printed: str, shown: str) -> None:
    assert readable_line(printed) == shown


def test_an_actor_without_a_log_or_words_is_said_to_have_none(tmp_path: Path) -> None:
    assert "on the node that it ran on" in last_words(tmp_path / "rollout-0.log", wait_s=0)
    (tmp_path / "rollout-0.log").write_text("=== 2026-01-01 00:00:00 rollout[0]: process 1 on a starts\n")
    assert last_words(tmp_path / "rollout-0.log", wait_s=0) == f"it left nothing in {tmp_path / 'rollout-0.log'}"


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """A run of two stages; the second has written last."""
    for age, stage in ((60, "sft"), (0, "grpo")):
        directory = tmp_path / "run" / stage / "logs"
        directory.mkdir(parents=True)
        for name in ("run", "rollout-0", "rollout-10", "rollout-2", "trainer-0"):
            path = directory / f"{name}.log"
            path.write_text("".join(f"{stage} {name} {number}\n" for number in range(100)))
            os.utime(path, (time.time() - age, time.time() - age))
    return tmp_path / "run"


def test_the_logs_of_all_stages_are_found_in_the_order_in_which_stages_ran_and_ranks_count(run_directory: Path) -> None:
    names = [log.name for log in find_logs(run_directory)]
    of_stage = ["run", "rollout-0", "rollout-2", "rollout-10", "trainer-0"]
    assert names == [f"sft/{name}" for name in of_stage] + [f"grpo/{name}" for name in of_stage]
    assert [log.name for log in find_logs(run_directory / "sft")] == of_stage


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("trainer-0", ["grpo/trainer-0"]),
        ("trainer[0]", ["grpo/trainer-0"]),
        ("sft/rollout-2", ["sft/rollout-2"]),
        ("sft/rollout-2.log", ["sft/rollout-2"]),
        ("rollout", ["grpo/rollout-0", "grpo/rollout-2", "grpo/rollout-10"]),
        ("sft/rollout", ["sft/rollout-0", "sft/rollout-2", "sft/rollout-10"]),
        ("sft", ["sft/run", "sft/rollout-0", "sft/rollout-2", "sft/rollout-10", "sft/trainer-0"]),
    ],
)
def test_a_log_is_meant_by_its_name_its_role_or_its_stage(run_directory: Path, wanted: str, chosen: list[str]) -> None:
    assert [log.name for log in choose_logs(find_logs(run_directory), wanted)] == chosen


def test_what_is_no_log_or_no_run_is_said_with_what_there_is(run_directory: Path) -> None:
    with pytest.raises(HistoryError, match=r"no log is called critic-0; there are sft/run, sft/rollout-0"):
        choose_logs(find_logs(run_directory), "critic-0")
    with pytest.raises(HistoryError, match=r"is no run's directory.*: give the directory"):
        find_logs(run_directory / "nowhere")


def test_the_last_lines_are_read_from_the_end_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_BLOCK", 16)
    path = tmp_path / "a.log"
    path.write_text("".join(f"line {number}\n" for number in range(50)) + "token=abcdefghijk\nno end")
    assert last_lines(path, 4) == ["line 48", "line 49", "token=***", "no end"]
    assert len(last_lines(path, 1000)) == 52
    assert last_lines(path, 0) == []


def test_what_is_added_is_followed_also_when_the_log_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    path = tmp_path / "logs" / "rollout-0.log"
    path.write_text("old and long enough\n")
    added = follow(find_logs(tmp_path), poll_s=0)
    assert next(added) is None
    with path.open("a") as file:
        file.write("one\ntw")
    (_, line), nothing = next(added), next(added)
    assert (line, nothing) == ("one", None)
    with path.open("a") as file:
        file.write("o\n")
    assert next(added)[1] == "two" and next(added) is None
    path.write_text("anew\n")
    assert next(added)[1] == "anew"


def test_the_command_lists_logs_with_size_and_age_and_prints_the_last_lines_of_one(
    run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["logs", str(run_directory)]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.split()[:5] == ["sft/run", "1.1", "KiB", "60", "s"] and len(rest) == 9
    assert main(["logs", str(run_directory), "trainer-0", "--lines", "2"]) == 0
    assert capsys.readouterr().out == "grpo trainer-0 98\ngrpo trainer-0 99\n"
    assert main(["logs", str(run_directory), "rollout", "-n", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[2] == "grpo/rollout-10 | grpo rollout-10 99"


def test_the_command_says_in_one_line_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", str(tmp_path / "nowhere")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
