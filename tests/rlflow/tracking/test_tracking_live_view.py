"""What stands below the lines on a terminal, drawn at several sizes."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from test_tracking_sinks import episode

from rlflow.tracking.console import _LenientStream
from rlflow.tracking.episodes import Episodes
from rlflow.tracking.live_view import LiveView


class Clock:
    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def view_of(*, total: int = 10, encoding: str = "utf-8") -> tuple[LiveView, Clock]:
    clock = Clock()
    stream = _LenientStream(io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    return LiveView("grpo", total, 0, clock, stream.encodable), clock


def drawn(view: LiveView, width: int = 100, height: int = 30) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO(), color_system=None, force_terminal=True)
    with console.capture() as capture:
        console.print(view.draw(width, height))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_the_bar_tells_what_is_left_of_the_run_and_of_the_phase() -> None:
    view, clock = view_of()
    for step in (1, 2, 3):
        clock.seconds += 10
        view.log(step, {"reward/mean": 0.5})
    # Two steps took 20 s since the first was logged; seven are left.
    assert "3/10  0:30 < 1:10" in drawn(view)[0]
    view.progress("generating", 0, 64)
    clock.seconds += 3
    view.progress("generating", 16, 64)
    assert drawn(view)[0].endswith("0:33 < 1:07  generating 16/64  0:03 < 0:09")
    view.progress("train", 0, 0)
    clock.seconds += 5
    assert drawn(view)[0].endswith("train  0:05")


def test_trends_are_of_the_headline_metrics_of_the_last_steps() -> None:
    view, _ = view_of(total=100)
    for step in range(1, 101):
        view.log(step, {"reward/mean": step / 100, "completion/mean_tokens": 7.0, "loss/policy": 0.1, "entropy": 1.0})
    _, reward, length = drawn(view, width=120)
    assert reward.split() == ["reward", "1", reward.split()[2], "0.410", "to", "1"]
    assert len(reward.split()[2]) == 60 and reward.split()[2][0] == "▁" and reward.split()[2][-1] == "█"
    assert length.split()[:2] == ["len", "7"]


def test_the_best_and_the_worst_completion_have_a_line_each_without_line_breaks_or_escape_codes() -> None:
    view, _ = view_of()
    long = "begins " + "x" * 500 + " ends with 71"
    view.episodes(Episodes(1, [episode("two\n\n\x1b[2J2", 1.0, 1.0), episode(long, 0.0, -1.0)]))
    _, best, worst = drawn(view)
    assert best == "best    1        What is 1 + 1? -> two ?[2J2"
    assert worst.startswith("worst   0        What is 1 + 1? -> begins xxx") and worst.endswith("ends with 71")
    assert len(worst) < 100
    view.episodes(Episodes(2, [episode("a", 0.5, 0.0), episode("b", 0.5, 0.0)]))
    assert [line.split()[0] for line in drawn(view)[1:]] == ["all"]
    view.episodes(Episodes(3, [episode("a", float("nan"), 0.0)]))
    assert len(drawn(view)) == 1


@pytest.mark.parametrize("width", [8, 20, 40, 59, 60, 80, 200])
@pytest.mark.parametrize("height", [3, 14, 50])
def test_whatever_the_size_no_row_is_broken_in_two(width: int, height: int) -> None:
    view, _ = view_of()
    view.log(1, {"reward/mean": 0.5, "completion/mean_tokens": 7.0})
    view.episodes(Episodes(1, [episode("数学" * 200, 1.0, 1.0), episode("no", 0.0, -1.0)]))
    rows = drawn(view, width, height)
    assert len(rows) == 1 + (height >= 14) * (2 + 2 * (width >= 60))
    assert rows[0].startswith("g")


def test_an_encoding_without_blocks_has_numbers_and_escapes() -> None:
    view, _ = view_of(encoding="ascii")
    for step in range(1, 5):
        view.log(step, {"reward/mean": step / 10})
    view.episodes(Episodes(4, [episode("5 ☃", 1.0, 1.0)]))
    _, reward, completion = drawn(view)
    assert reward.split() == ["reward", "0.400", "0.100", "to", "0.400"]
    assert completion.endswith("-> 5 \\u2603")


def test_rewards_that_are_no_numbers_leave_a_gap() -> None:
    view, _ = view_of()
    for reward in (0.1, float("nan"), 0.3):
        view.log(1, {"reward/mean": reward})
    assert "▁ █" in drawn(view)[1]
    view.log(4, {"reward/mean": float("nan")})
    assert drawn(view)[1].split()[1] == "-"
