"""How far something is: nothing of what is over at once, lines where there is no terminal, a pace without its start."""

from __future__ import annotations

import io

import pytest

from rlflow.progress import ProgressBar, format_seconds


class Clock:
    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def lines_of(*updates: tuple[float, int]) -> list[str]:
    """What is written of updates, each at a second after the start; 10 are to be done."""
    clock, stream = Clock(), io.StringIO()
    with ProgressBar("reading", "rows", stream=stream, now=clock) as bar:
        for second, done in updates:
            clock.seconds = 100.0 + second
            bar.update(done, 10, "half" if done == 5 else "")
    return stream.getvalue().splitlines()


def test_what_is_over_within_two_seconds_is_not_told():
    assert lines_of((0.5, 5), (1.9, 10)) == []


def test_a_line_every_ten_seconds_says_what_is_left():
    # Thirty seconds of loading first: then five rows take ten seconds.
    found = lines_of((30, 0), (32, 1), (40, 3), (42, 5), (43, 6), (50, 10))
    assert found == [
        "reading: 1 of 10 rows, 18 s left",
        "reading: 5 of 10 rows, 12 s left, half",
        "reading: 10 of 10 rows",
    ]


def test_no_escape_codes_are_written_where_there_is_no_terminal():
    assert "\x1b" not in "".join(lines_of((3, 5), (20, 10)))


@pytest.mark.parametrize(("seconds", "text"), [(42.4, "42 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")])
def test_times_are_written_for_people(seconds: float, text: str):
    assert format_seconds(seconds) == text
