from __future__ import annotations

import io
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlflow.tracking.console import HEARTBEAT_SECONDS, LINE_SECONDS, ConsoleTracker
from rlflow.types import StepStats


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(
    stream: io.StringIO, num_steps: int, *, seconds: float = 1.0, evaluate_at: tuple[int, ...] = ()
) -> ConsoleTracker:
    clock = Clock()
    tracker = ConsoleTracker("grpo", num_steps, Path("runs/x"), stream=stream, now=clock)
    for step in range(1, num_steps + 1):
        clock.seconds += seconds
        metrics = {"reward/mean": step / 100, "loss/total": 0.5, "time/step_s": seconds}
        if step in evaluate_at:
            metrics["eval/heldout/pass@1"] = step / num_steps
        tracker.log(StepStats(step, metrics))
    return tracker


def printed_steps(text: str) -> list[int]:
    return [int(line.split()[1].split("/")[0]) for line in text.splitlines() if line.startswith("step")]


def test_without_a_terminal_lines_come_seconds_apart_with_first_last_and_evaluated_steps() -> None:
    stream = io.StringIO()
    run(stream, 20, evaluate_at=(8,)).finish({})
    assert printed_steps(stream.getvalue()) == [1, 6, 8, 13, 18, 20]
    assert "\x1b" not in stream.getvalue()
    assert LINE_SECONDS == 5.0


def test_a_variable_that_asks_for_colours_makes_no_terminal_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    run(stream, 3).finish({})
    text = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert "\x1b" not in text and "\r" not in text and printed_steps(text) == [1, 3]


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    run(stream, 3).finish({})
    assert "\x1b" not in stream.getvalue() and printed_steps(stream.getvalue()) == [1, 3]


def test_a_run_that_stops_early_still_prints_its_last_step() -> None:
    stream = io.StringIO()
    tracker = run(stream, 3, seconds=0.1)
    tracker.log(StepStats(2, {"loss/total": 1.0}))
    tracker.close()
    tracker.close()
    assert printed_steps(stream.getvalue())[-1] == 2


def test_a_skipped_step_is_printed_at_once() -> None:
    stream = io.StringIO()
    tracker = run(stream, 1)
    tracker.log(StepStats(7, {"loss/total": 1.0, "trainer/skipped": 1.0}))
    assert "skipped 1" in stream.getvalue()


def test_a_long_step_speaks_up_without_a_terminal() -> None:
    stream, clock = io.StringIO(), Clock()
    tracker = ConsoleTracker("grpo", 10, Path("runs/x"), stream=stream, now=clock)
    for done in range(0, 100, 10):
        clock.seconds += HEARTBEAT_SECONDS / 5
        tracker.progress("generating", done, 100)
    assert stream.getvalue().splitlines() == ["step  1/10   generating 40/100", "step  1/10   generating 90/100"]


def test_evaluations_tell_the_change_since_the_first_and_the_summary_both_ends() -> None:
    stream = io.StringIO()
    run(stream, 4, evaluate_at=(1, 2, 4)).finish({"best": 1.0})
    text = stream.getvalue()
    assert "eval heldout at step 1   pass@1 0.250\n" in text
    assert "eval heldout at step 4   pass@1 1 (+0.750)\n" in text
    assert "0.250 -> 1   +0.750 (step 1 to 4)" in text
    assert text.rstrip().endswith("runs/x")


def test_a_resumed_run_compares_with_the_evaluation_before_the_stop() -> None:
    stream = io.StringIO()
    before = {"eval/heldout/pass@1": 0.25, "eval/heldout/f1": 0.0, "eval/heldout/pearson": math.nan}
    earlier = [{"step": 0.0, "time": 1.0, **before}]
    tracker = ConsoleTracker("grpo", 9, Path("runs/x"), resumed_at=5, earlier=earlier, stream=stream)
    tracker.log(StepStats(6, {"eval/heldout/pass@1": 0.5, "eval/heldout/f1": 0.0, "eval/heldout/pearson": 0.5}))
    tracker.finish({})
    assert "0.250 -> 0.500   +0.250 (step 0 to 6)" in stream.getvalue()
    assert "0 -> 0   no change (step 0 to 6)" in stream.getvalue()
    assert "- -> 0.500   (step 0 to 6)" in stream.getvalue()


@pytest.mark.parametrize(("columns", "last_field"), [("100", "1.0s"), ("40", "loss 0.500"), ("30", "reward 0.010")])
def test_on_a_terminal_every_step_has_one_line_that_fits(
    monkeypatch: pytest.MonkeyPatch, columns: str, last_field: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    run(stream, 2).close()
    visible = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", stream.getvalue()).replace("\r", "\n")
    (first,) = [line for line in visible.split("\n") if line.startswith("step 1/2")]
    assert len(first.rstrip()) <= int(columns)
    assert first.rstrip().endswith(last_field)


def test_an_encoding_without_unicode_gets_ascii_and_control_characters_never_pass() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    tracker = ConsoleTracker("grpo", 1, Path("runs/ü"), stream=stream)
    tracker.message("caf\u00e9 \x1b[2J [bold] done")
    tracker.finish({})
    text = raw.getvalue().decode("ascii")
    assert text.startswith("caf\\xe9 ?[2J [bold] done\n")


def test_markup_in_a_message_is_text() -> None:
    stream = io.StringIO()
    ConsoleTracker("grpo", 1, Path("runs/x"), stream=stream).message("worker[1] of [red]group[/red] died")
    assert stream.getvalue() == "worker[1] of [red]group[/red] died\n"


SCRIPT = """
import sys
from pathlib import Path
from rlflow.tracking.console import ConsoleTracker
from rlflow.types import StepStats
tracker = ConsoleTracker("grpo", 500, Path("runs/x"))
for step in range(1, 501):
    tracker.progress("generating", 1, 2)
    tracker.log(StepStats(step, {"reward/mean": 0.5, "trainer/skipped": 1.0, "eval/heldout/pass@1": 0.5}))
tracker.finish({})
tracker.close()
print("reached the end", file=sys.stderr)
"""


@pytest.mark.slow
def test_a_reader_that_goes_away_does_not_end_the_run() -> None:
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read().decode()
    assert (process.wait(), said) == (0, "reached the end\n")


@pytest.mark.slow
def test_in_a_real_terminal_the_bar_moves_and_the_cursor_comes_back() -> None:
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        seen = b""
        while True:
            try:
                seen += os.read(leader, 65536)
            except OSError:
                break
    os.close(leader)
    assert process.returncode == 0
    assert "━".encode() in seen
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")
