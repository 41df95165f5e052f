"""The run as people see it: on a terminal a line a step above a live view (live_view.py), elsewhere a few plain lines.

Everything written is ASCII but the bar, the trends and what the policy wrote; where the terminal's encoding cannot hold
these, the bar turns ASCII, trends are left out and characters are escaped. A terminal that goes away (a closed pipe, a
lost connection) silences the console; the run goes on.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO, cast

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rlflow.tracking import lines
from rlflow.tracking.episodes import Episodes
from rlflow.tracking.live_view import LiveView
from rlflow.tracking.tracker import Tracker
from rlflow.types import StepStats

LINE_SECONDS = 5.0
"""Without a terminal: least time between two step lines."""
HEARTBEAT_SECONDS = 30.0
"""Without a terminal: a step in progress speaks up after this long without a line."""


class ConsoleTracker(Tracker):
    """Draws from the driver only.

    Args:
        title: What the bar is called.
        total: Steps of the run; 0 when unknown.
        directory: Where results are, for the last line.
        resumed_at: Step the bar starts at.
        earlier: Steps logged before a resume: the first evaluation among them is what later ones are compared with.
        stream: Where to write; standard output when absent.
        now: Seconds, monotonic.
    """

    def __init__(
        self,
        title: str,
        total: int,
        directory: Path,
        *,
        resumed_at: int = 0,
        earlier: Sequence[Mapping[str, float]] = (),
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = _LenientStream(stream or sys.stdout)
        self.console = Console(file=cast(TextIO, self._stream), highlight=False)
        self._directory, self._now = directory, now
        self._view = LiveView(title, total, resumed_at, now, self._stream.encodable)
        self._unprinted: StepStats | None = None
        self._step_line_at, self._spoke_at = -math.inf, now()
        self._evaluations: dict[str, list[tuple[int, dict[str, float]]]] = {}
        for row in earlier:
            self._remember(int(row["step"]), row)
            self._view.remember(row)
        self._live: Live | None = None
        # Not `console.is_terminal`, which a variable such as FORCE_COLOR makes of a file.
        if self._stream.isatty() and not self.console.is_dumb_terminal:
            self._live = Live(
                get_renderable=lambda: self._view.draw(*self.console.size),
                console=self.console,
                transient=True,
                redirect_stderr=sys.stderr.isatty(),
            )
            self._live.start()

    def log(self, stats: StepStats) -> None:
        self._view.log(stats.step, stats.metrics)
        if lines.step_fields(stats.metrics):
            self._unprinted = stats
            due = self._now() - self._step_line_at >= LINE_SECONDS
            if self._live or due or stats.step == self._view.total or lines.troubles(stats.metrics):
                self._print_step()
        self._remember(stats.step, stats.metrics)
        for name, metrics in lines.split_evaluations(stats.metrics).items():
            self._print_step()
            self._print(self._evaluation_line(name, stats.step, metrics))

    def episodes(self, episodes: Episodes) -> None:
        if self._live:
            self._view.episodes(episodes)

    def message(self, text: str) -> None:
        self._print(Text(text), wrap=True)

    def progress(self, phase: str, done: int, total: int) -> None:
        self._view.progress(phase, done, total)
        if self._live is None and self._now() - self._spoke_at >= HEARTBEAT_SECONDS:
            self._print(Text(f"{self._step_label(self._view.step + 1)}   {self._view.phase}"))

    def finish(self, summary: Mapping[str, float]) -> None:
        self._print_step()
        self._stop_live()
        self._print(Text())
        self._print(Text(f"{self._view.title}: step {self._view.step} after {lines.duration(self._view.seconds)}"))
        for label, value in self._summary_rows(summary):
            self._print(Text.assemble("  ", (f"{label:<24}", "dim"), "  ", value))
        self._print(Text.assemble("  ", (f"{'results':<24}", "dim"), "  ", (str(self._directory), "bold")))

    def close(self) -> None:
        self._print_step()
        self._stop_live()

    def _summary_rows(self, summary: Mapping[str, float]) -> list[tuple[str, Text]]:
        rows = []
        for name, history in self._evaluations.items():
            (first_step, first), (last_step, last) = history[0], history[-1]
            for metric, value, change in lines.changes(first, last):
                if metric not in first or first_step == last_step:
                    rows.append((f"{name} {metric}", Text.assemble((value, "bold"), f"   (step {last_step})")))
                    continue
                text = Text.assemble(lines.number(first[metric]), " -> ", (value, "bold"))
                # From or to what is no number there is no change that could be told.
                moved = change or ("no change" if last[metric] == first[metric] else "")
                text.append(f"   {f'{moved} ' if moved else ''}(step {first_step} to {last_step})", style="dim")
                rows.append((f"{name} {metric}", text))
        return rows + [(label, Text(lines.number(value))) for label, value in summary.items()]

    def _remember(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, values in lines.split_evaluations(metrics).items():
            history = [(at, earlier) for at, earlier in self._evaluations.get(name, []) if at < step]
            self._evaluations[name] = [*history, (step, values)]

    def _step_label(self, step: int) -> str:
        total = self._view.total
        return f"step {step:>{len(str(total))}}/{total}" if total else f"step {step}"

    def _print_step(self) -> None:
        """Prints the newest step's line unless it was printed."""
        if self._unprinted is None:
            return
        stats, self._unprinted = self._unprinted, None
        self._step_line_at = self._now()
        self._print(self._step_line(stats))

    def _step_line(self, stats: StepStats) -> Text:
        """As many fields as the terminal's width holds; what went wrong comes first."""
        text = Text.assemble((self._step_label(stats.step), "cyan"))
        width = self.console.width if self._live else math.inf
        pieces = [Text(trouble, style="bold yellow") for trouble in lines.troubles(stats.metrics)]
        for label, value in lines.step_fields(stats.metrics):
            pieces.append(Text.assemble((f"{label} ", "dim"), value))
        if "time/step_s" in stats.metrics:
            pieces.append(Text(f"{stats.metrics['time/step_s']:.1f}s", style="dim"))
        for piece in pieces:
            if len(text) + 2 + len(piece.plain.rstrip()) > width:
                break
            text.append("  ").append_text(piece)
        return text

    def _evaluation_line(self, name: str, step: int, metrics: Mapping[str, float]) -> Text:
        first_step, first = self._evaluations[name][0]
        text = Text.assemble(("eval ", "bold magenta"), (name, "bold"), f" at step {step}")
        for metric, value, change in lines.changes(first, metrics):
            text.append(f"   {metric} ", style="dim")
            text.append(value, style="bold")
            if change and first_step != step:
                text.append(f" ({change})", style="dim")
        return text

    def _print(self, text: Text, *, wrap: bool = False) -> None:
        text.plain = self._stream.encodable(text.plain)
        one_line = self._live is not None and not wrap
        self.console.print(text, soft_wrap=not one_line, no_wrap=one_line, overflow="crop" if one_line else None)
        self._spoke_at = self._now()

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class _LenientStream:
    """A text stream that writes what its encoding can hold, and goes silent when its other end is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding or "utf-8"

    def encodable(self, text: str) -> str:
        """``text`` without terminal control characters and without what the encoding lacks."""
        visible = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
        return visible.encode(self.encoding, "backslashreplace").decode(self.encoding)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._silence()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._silence()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def _silence(self) -> None:
        """Sends the descriptor to /dev/null, so that the flush at exit cannot fail either."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
