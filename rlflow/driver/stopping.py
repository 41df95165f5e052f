"""How a run that is asked to stop does so: SIGTERM and SIGINT.

before the first step      at once; what was started ends with it
in a step                  at its end, with a checkpoint; a second Ctrl-C at once, with the checkpoint there is
once the run is ending     nothing more: the exit code is that of the first signal
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlflow import checkpoint
from rlflow.actors.actor_group import Pending
from rlflow.driver.clock import Clock
from rlflow.driver.errors import GO_ON, RunError, StoppedUnsaved, StopRequested
from rlflow.driver.resuming import kept_steps
from rlflow.recipe import Recipe

SAME_PRESS_S = 1.0
"""A terminal, and what started the run there, may both pass one Ctrl-C on: two that come so close are one."""
_REINSTALL_S = 0.01
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Notes that somebody asked the run to stop; interrupts it where there is nothing to finish.

    Ray returns from its waits when a signal handler raises KeyboardInterrupt, and for no other exception.
    """

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._is_ending = False
        self._notice: Callable[[], str] | None = None
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        return self._asked_at is not None

    def install(self) -> None:
        """Ray puts its own handlers in place when it starts, so this is called again afterwards."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.signal(number, self._handle)
                self._before.setdefault(number, before)

    def kept_while(self, work: Callable[[], None], timeout_s: float = 120.0) -> None:
        """Does ``work`` in a thread, and puts the handlers back in place all the while.

        Ray sets SIGTERM to its default, which ends the process, in the middle of its own shutdown.
        """
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        deadline = time.monotonic() + timeout_s
        while thread.is_alive() and time.monotonic() < deadline:
            self.install()
            thread.join(_REINSTALL_S)
        self.install()

    def restore(self, *, process_ends: bool = False) -> None:
        """Args: process_ends: where the run was asked to stop, no further signal changes the process's exit code."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if process_ends and self.asked() else handler)

    def end(self) -> None:
        """From now on signals change nothing: the run ends anyway."""
        self._is_ending = True

    @contextmanager
    def finishing_steps(self, notice: Callable[[], str]) -> Iterator[None]:
        """Within, the first signal waits for the end of the step.

        Args:
            notice: What that waits for; empty when no step is under way: then it does not wait.
        """
        self._notice = notice
        try:
            yield
        finally:
            self._notice = None

    def _handle(self, number: int, _frame: Any) -> None:
        if self._is_ending:
            return
        now = time.monotonic()
        told = self._notice() if self._notice is not None else ""
        if not told or (number == signal.SIGINT and self._asked_at is not None and now - self._asked_at > SAME_PRESS_S):
            self._asked_at = self._asked_at or now
            self._is_ending = True
            raise KeyboardInterrupt
        if self._asked_at is None:
            self._asked_at = now
            # A handler may have come between the halves of another write to the same stream.
            with contextlib.suppress(RuntimeError):
                print(f"rlflow: {told}", file=sys.stderr, flush=True)


def notice_of(step: int | None, checkpoints: Path, clock: Clock) -> str:
    """What a stop waits for, and what a second Ctrl-C would leave; empty when no step is under way."""
    if step is None:
        return ""
    waiting = Pending.current()
    owed = f" ({', '.join(waiting.owing)}: {waiting.call})" if waiting is not None else ""
    steps = checkpoint.saved_steps(checkpoints)
    left = f"with the checkpoint of step {steps[-1]}" if steps else "and nothing is saved yet"
    phase = clock.phase or "its end"
    return f"stopping after step {step}, waiting for {phase}{owed}; Ctrl-C again stops at once, {left}"


def stopped(recipes: Sequence[Recipe]) -> RunError:
    """The end of a run that was stopped at once: what of it can go on."""
    for recipe in reversed(recipes):
        directory = Path(recipe.run.output_dir)
        step = kept_steps(recipe)
        if step or (directory / "final").exists():
            drawn = f"the checkpoint of step {step}" if recipe.trains else f"the answers of {step} steps"
            what = drawn if step else "final/"
            return StopRequested(f"stopped; {directory} has {what}: {GO_ON}")
    return StoppedUnsaved("stopped before anything was saved")
