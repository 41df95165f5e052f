"""How far something is that takes longer than people wait without a word: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import rich.progress

SILENT_S = 2.0
"""Nothing is said of what is over by then."""
_LINE_S = 10.0
"""Between two lines where there is no terminal."""


class ProgressBar:
    """Says ``what`` is how far, and when it will be done; only of what takes over two seconds."""

    def __init__(
        self,
        what: str,
        unit: str,
        *,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            unit: What is counted, e.g. ``completions``.
            stream: stderr when left out: what a command prints may be read by another program.
        """
        self.what, self.unit = what, unit
        self._stream = sys.stderr if stream is None else stream
        self._now = now
        self._began = self._said = now()
        self._first: tuple[float, int] | None = None
        """When the first update came, and how much was done by then: loading what does the work is not its pace."""
        self._bar: rich.progress.Progress | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int, detail: str = "") -> None:
        """``done`` of ``total`` now; ``detail`` is what people want to know beside it, such as a score so far."""
        now = self._now()
        if self._first is None:
            self._first = (now, done)
        if now - self._began < SILENT_S:
            return
        if self._stream.isatty():
            self._draw(done, total, detail)
        elif done and (done == total or now - max(self._said, self._began + SILENT_S - _LINE_S) >= _LINE_S):
            self._said = now
            since, before = self._first
            left = (now - since) * (total - done) / (done - before) if done > before else 0.0
            remaining = f", {format_seconds(left)} left" if left else ""
            self._stream.write(f"{self.what}: {done} of {total} {self.unit}{remaining}{detail and f', {detail}'}\n")
            self._stream.flush()

    def _draw(self, done: int, total: int, detail: str) -> None:
        if self._bar is None:
            self._bar = _make_bar(self._stream)
            self._bar.add_task(self.what, total=total, unit=self.unit, detail="")
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, detail=detail)


def format_seconds(seconds: float) -> str:
    """``42 s``, ``3 min 5 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _make_bar(stream: TextIO) -> rich.progress.Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
        console=Console(file=stream),
        transient=True,
    )
