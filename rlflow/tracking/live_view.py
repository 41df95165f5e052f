"""What stands below the lines on a terminal while a run goes on: bar, phase, time left, trends, the latest completions.

    grpo  ━━━━━━━━━━━━━━━━━━━━━━━━  120/500  4:10 < 13:12  generating 37/64  0:03 < 0:02
    reward  0.412  ▁▂▂▃▃▄▅▅▆▆▇█  0.051 to 0.430
    len     182    █▇▆▆▅▄▄▃▃▂▂▁  171 to 240
    best    1      What is 17 + 5? -> 17 + 5 = 22
    worst   0      What is 9 * 8? -> 9 * 8 = 71

It draws as much of that as the terminal has room for.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlflow.tracking import lines
from rlflow.tracking.episodes import Episode, Episodes, shortened
from rlflow.tracking.rollouts import last_user_text

BAR_WIDTHS = (10, 40)
MOST_STEPS = 60
"""Of a trend."""
LEAST_HEIGHT = 14
"""Rows of a terminal: a lower one has the bar alone."""
LEAST_WIDTH = 60
"""Columns of a terminal: a narrower one shows no completions."""
_LABEL, _VALUE, _SPAN = 6, 7, 16
"""Columns of a row's pieces."""


class LiveView:
    """Holds what is to be drawn.

    Args:
        total: Steps of the run; 0 when unknown.
        step: The one that is done when it starts.
        now: Seconds, monotonic.
        encodable: Text as the terminal's encoding can hold it.
    """

    def __init__(
        self, title: str, total: int, step: int, now: Callable[[], float], encodable: Callable[[str], str]
    ) -> None:
        self.title, self.total, self.step = title, total, step
        self._now, self._encodable = now, encodable
        self._started = now()
        self._phase, self._done, self._of, self._phase_at = "starting", 0, 0, now()
        self._first_log: tuple[int, float] | None = None
        self._ends_at: float | None = None
        self._trends: dict[str, deque[float]] = {}
        self._extremes: list[tuple[str, Episode]] = []

    @property
    def seconds(self) -> float:
        """Since it started."""
        return self._now() - self._started

    @property
    def phase(self) -> str:
        """What is being done, and how much of it is."""
        return f"{self._phase} {self._done}/{self._of}" if self._of else self._phase

    def progress(self, phase: str, done: int, total: int) -> None:
        if phase != self._phase or done < self._done:
            self._phase_at = self._now()
        self._phase, self._done, self._of = phase, done, total

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.step = step
        self.progress("", 0, 0)
        self.remember(metrics)
        now = self._now()
        if self._first_log is None:
            self._first_log = (step, now)
        first_step, first_at = self._first_log
        if step > first_step and self.total:
            # The steps that are left take as long as those since the first that was logged.
            self._ends_at = now + (now - first_at) / (step - first_step) * (self.total - step)

    def remember(self, metrics: Mapping[str, float]) -> None:
        """Adds a step's numbers to the trends."""
        for label, value in lines.headline(metrics).items():
            self._trends.setdefault(label, deque(maxlen=MOST_STEPS)).append(value)

    def episodes(self, episodes: Episodes) -> None:
        ranked = episodes.by_reward()
        if not ranked:
            self._extremes = []
        elif ranked[0].rollout.reward == ranked[-1].rollout.reward:
            self._extremes = [("all", ranked[0])]
        else:
            self._extremes = [("best", ranked[0]), ("worst", ranked[-1])]

    def draw(self, width: int, height: int) -> RenderableType:
        """At most ``width`` columns, and fewer than ``height`` rows."""
        if height < LEAST_HEIGHT:
            return self._bar(width, self._latest())
        rows: list[RenderableType] = [self._bar(width, [])]
        rows += [self._trend(label, values, width) for label, values in self._trends.items()]
        if width >= LEAST_WIDTH:
            rows += [self._completion(label, episode, width) for label, episode in self._extremes]
        return Group(*rows)

    def _bar(self, width: int, more: list[str]) -> Table:
        """As many pieces as there is room for."""
        now = self._now()
        steps = f"{self.step}/{self.total}" if self.total else str(self.step)
        left = "" if self._ends_at is None else f" < {lines.clock(max(0.0, self._ends_at - now))}"
        pieces = [self.title, steps, lines.clock(now - self._started) + left, *self._phase_pieces(now), *more]
        least, most = BAR_WIDTHS
        while len(pieces) > 2 and sum(len(piece) + 2 for piece in pieces) + least > width - 1:
            pieces.pop()
        bar_width = min(most, max(least, width - 1 - sum(len(piece) + 2 for piece in pieces)))
        bar = ProgressBar(total=self.total or None, completed=self.step, width=bar_width, pulse=not self.total)
        grid = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(len(pieces) + 1):
            grid.add_column(no_wrap=True, overflow="crop")
        title, *rest = (Text(self._encodable(piece)) for piece in pieces)
        title.stylize("bold")
        rest[0].stylize("cyan")
        grid.add_row(title, bar, *rest)
        return grid

    def _phase_pieces(self, now: float) -> list[str]:
        """The phase, and how long it has taken and will."""
        if not self._phase:
            return []
        spent = now - self._phase_at
        if not self._of or not self._done:
            return [self.phase] if spent < 1 else [self.phase, lines.clock(spent)]
        left = spent / self._done * (self._of - self._done)
        return [self.phase, f"{lines.clock(spent)} < {lines.clock(left)}"]

    def _latest(self) -> list[str]:
        return [f"{label} {lines.number(values[-1])}" for label, values in self._trends.items()]

    def _trend(self, label: str, values: deque[float], width: int) -> Text:
        finite = [value for value in values if math.isfinite(value)]
        text = Text.assemble((f"{label:<{_LABEL}}  ", "dim"), (f"{lines.number(values[-1]):<{_VALUE}}", "bold"))
        if not finite:
            return _in_one_row(text, width)
        span = f"{lines.number(min(finite))} to {lines.number(max(finite))}"
        room = width - 1 - len(text) - 2
        drawn = lines.sparkline(list(values)[-max(1, min(MOST_STEPS, room - _SPAN - 2)) :])
        if room >= _SPAN + 12 and self._encodable(drawn) == drawn:
            text.append("  ").append(drawn, style="green").append(f"  {span}", style="dim")
        elif room >= len(span):
            text.append(f"  {span}", style="dim")
        return _in_one_row(text, width)

    def _completion(self, label: str, episode: Episode, width: int) -> Text:
        reward = lines.number(episode.rollout.reward)
        text = Text.assemble((f"{label:<{_LABEL}}  ", "dim"), (f"{reward:<{_VALUE}}  ", "bold"))
        room = width - 1 - len(text)
        # What a terminal draws in two columns may stand anywhere: the line is cut by columns at last.
        prompt = shortened(" ".join(last_user_text(episode.prompt).split()), room // 3)
        written = shortened(" ".join(episode.rollout.text.split()), room - len(prompt) - 4)
        text.append(self._encodable(f"{prompt} -> "), style="dim").append(self._encodable(written))
        return _in_one_row(text, width)


def _in_one_row(text: Text, width: int) -> Text:
    text.truncate(width - 1)
    text.no_wrap = True
    return text
