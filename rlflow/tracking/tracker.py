"""What the driver tells: one protocol, and the tracker that passes everything on to several."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rlflow.tracking.redact import redact_text
from rlflow.types import StepStats

if TYPE_CHECKING:
    from rlflow.tracking.episodes import Episodes


class Tracker(Protocol):
    """Hears what a run does. A tracker overrides what it cares about; no call blocks the run."""

    def log(self, stats: StepStats) -> None:
        """One step is done. Keys that start with ``eval/`` are a held-out measurement of the policy after it."""

    def episodes(self, episodes: Episodes) -> None:
        """What the policy wrote in a step, before that step is logged."""

    def message(self, text: str) -> None:
        """Something people should read."""

    def progress(self, phase: str, done: int, total: int) -> None:
        """What the current step is doing, e.g. ``generating``, 320 of 512; ``total`` 0 when it cannot be counted."""

    def finish(self, summary: Mapping[str, float]) -> None:
        """The run reached its end. ``summary``: final numbers, beyond the last step's."""

    def close(self) -> None:
        """No more calls come, whether the run finished or not. May be called again."""


class Trackers(Tracker):
    """Passes every call on, in order. Messages lose their secrets here, before anybody writes them."""

    def __init__(self, trackers: list[Tracker] | None = None) -> None:
        self._trackers = trackers or []

    def add(self, tracker: Tracker) -> None:
        self._trackers.append(tracker)

    def log(self, stats: StepStats) -> None:
        for tracker in self._trackers:
            tracker.log(stats)

    def episodes(self, episodes: Episodes) -> None:
        for tracker in self._trackers:
            tracker.episodes(episodes)

    def message(self, text: str) -> None:
        text = redact_text(text)
        for tracker in self._trackers:
            tracker.message(text)

    def progress(self, phase: str, done: int, total: int) -> None:
        for tracker in self._trackers:
            tracker.progress(phase, done, total)

    def finish(self, summary: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.finish(summary)

    def close(self) -> None:
        with ExitStack() as all_are_closed:
            for tracker in reversed(self._trackers):
                all_are_closed.callback(tracker.close)


class MessageLog(Tracker):
    """Appends every message to a file, behind the time: what a run said stays with it, whoever else was told."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(exist_ok=True)

    def message(self, text: str) -> None:
        with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


class StderrMessages(Tracker):
    """Messages of a run without console: warnings must reach somebody."""

    def message(self, text: str) -> None:
        print(f"rlflow: {text}", file=sys.stderr, flush=True)
