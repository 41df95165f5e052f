"""Where the time goes: seconds of each named phase, of a step and of everything before the first one."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlflow.tracking.spans import Trace


class Clock:
    """Seconds spent in each named phase of a step. Those of a phase within another are its own alone."""

    def __init__(self, before: float = 0.0) -> None:
        """Args: before: seconds that had passed when this clock was made; they are the phase ``startup_process``."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.whole: dict[str, float] = defaultdict(float)
        self.before = before
        self.made = self.started = time.perf_counter()
        self.phase = ""
        """The phase under way, the innermost; empty between phases."""
        self.trace = Trace()
        """Of every phase, and of whatever else is added to it."""
        self.tell: Callable[[str], None] = lambda phase: None
        """Called with the name of each phase that begins."""
        self._within: list[float] = []
        """Of every phase under way, the outermost first: the seconds of those that ended within it."""
        if before:
            self.seconds["startup_process"] = self.whole["startup_process"] = before

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.tell(phase)
        started, began = time.perf_counter(), time.time()
        around, self.phase = self.phase, phase
        self._within.append(0.0)
        try:
            yield
        finally:
            self.phase = around
            within = self._within.pop()
            self.trace.add("driver", phase, began, time.time())
        seconds = time.perf_counter() - started
        if self._within:
            self._within[-1] += seconds
        self.seconds[phase] += seconds - within
        self.whole[phase] += seconds - within

    def metrics(self) -> dict[str, float]:
        """``time/<phase>_s`` and ``time/step_s`` since the last call."""
        now = time.perf_counter()
        metrics = {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()}
        metrics["time/step_s"] = now - self.started
        self.seconds.clear()
        self.started = now
        return metrics

    def story(self, step: int) -> str:
        """One sentence: how long it took from the start to the end of this step, and what took it."""
        total = self.before + time.perf_counter() - self.made
        parts = {phase.removeprefix("startup_"): seconds for phase, seconds in self.whole.items() if seconds >= 0.05}
        parts["rest"] = total - sum(self.whole.values())
        told = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in parts.items())
        return f"step {step} done {total:.1f} s after the start: {told}"


def process_age_s() -> float:
    """Seconds since this process began; 0 where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
