"""Trackers of others (wandb, TensorBoard, trackio, SwanLab), at arm's length: a child process owns each, and nothing
that happens to it is felt here.

log, episodes --non-blocking pipe, bounded backlog--> child_process.py --> <name>_sink.py --> the disk, or a service
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlflow.tracking.tracker import Tracker
from rlflow.types import StepStats

if TYPE_CHECKING:
    from rlflow.tracking.episodes import Episodes

BACKLOG_BYTES = 4 << 20
"""What waits for a slow child; steps beyond it are dropped and counted."""
FINISH_SECONDS = 10.0
"""How long the end of a run waits for what is left to be sent."""
SAMPLE_ROWS = 12
"""Of a step's table."""
SAMPLES_SECONDS = 20.0
"""Least time between two tables: each is a file of its own for most trackers. The last step has one in any case."""


class ChildTracker(Tracker):
    """Passes everything on to a process that has the tracker's library.

    Args:
        name: The tracker's, as in a recipe.
        arguments: What its sink is made with.
        log_path: Where the process's own words go.
        say: Where one-line notices for people go.
        finish_seconds: Deadline of ``close``.
    """

    def __init__(
        self,
        name: str,
        arguments: Mapping[str, Any],
        log_path: Path,
        *,
        say: Callable[[str], None],
        finish_seconds: float = FINISH_SECONDS,
    ) -> None:
        self.name, self.dropped = name, 0
        self._say, self._finish_seconds, self._log_path = say, finish_seconds, log_path
        self._backlog = bytearray()
        self._heard = b""
        self._unsent: Episodes | None = None
        self._samples_at = -SAMPLES_SECONDS
        self._process: subprocess.Popen[bytes] | None = self._start()
        self._send({"start": arguments})

    def log(self, stats: StepStats) -> None:
        metrics: dict[str, float | int] = {name: float(value) for name, value in stats.metrics.items()}
        if self.dropped:
            metrics[f"tracking/{self.name}_dropped_steps"] = self.dropped
        self._send({"step": stats.step, "metrics": metrics})
        self._listen()

    def episodes(self, episodes: Episodes) -> None:
        if self._process is None:
            return
        shown: dict[str, Any] = {"step": episodes.step, "histograms": episodes.histograms()}
        now = time.monotonic()
        self._unsent = episodes
        if now - self._samples_at >= SAMPLES_SECONDS:
            self._samples_at, self._unsent = now, None
            shown["samples"] = episodes.samples(SAMPLE_ROWS)
        self._send(shown)

    def finish(self, summary: Mapping[str, float]) -> None:
        if self._unsent is not None:
            self._send({"step": self._unsent.step, "samples": self._unsent.samples(SAMPLE_ROWS)})
        self._send({"summary": {name: float(value) for name, value in summary.items()}}, droppable=False)
        self.close()

    def close(self) -> None:
        """Waits for the child at most ``finish_seconds``, then ends it; what it wrote to disk stays."""
        process, deadline = self._process, time.monotonic() + self._finish_seconds
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        while self._backlog and self._process is not None and (left := deadline - time.monotonic()) > 0:
            select.select([], [process.stdin], [], left)
            self._write()
        if self._process is None:
            return
        process.stdin.close()
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            where = f"see {self._log_path}; metrics.jsonl has everything"
            self._say(f"{self.name} did not finish within {self._finish_seconds:g} s and was ended: {where}")
        self._listen()
        process.stdout.close()
        self._process = None
        if self.dropped:
            self._say(f"{self.name} was too slow for {self.dropped} steps; metrics.jsonl has them")

    def _start(self) -> subprocess.Popen[bytes]:
        script = Path(__file__).with_name("child_process.py")
        self._log_path.parent.mkdir(exist_ok=True)
        with self._log_path.open("ab") as log:
            process = subprocess.Popen(
                # -P keeps this package's directory off the child's import path; its own session keeps Ctrl-C away.
                [sys.executable, "-P", str(script), self.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                bufsize=0,
            )
        assert process.stdin is not None and process.stdout is not None
        os.set_blocking(process.stdin.fileno(), False)
        os.set_blocking(process.stdout.fileno(), False)
        return process

    def _send(self, message: dict[str, Any], *, droppable: bool = True) -> None:
        """Puts a line in the backlog and writes what the pipe takes."""
        if self._process is None:
            return
        line = json.dumps(message).encode() + b"\n"
        if droppable and len(self._backlog) + len(line) > BACKLOG_BYTES:
            if not self.dropped:
                self._say(f"{self.name} is too slow: steps are left out of it; metrics.jsonl has them all")
            self.dropped += 1
        else:
            self._backlog += line
        self._write()

    def _write(self) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        try:
            while self._backlog:
                del self._backlog[: os.write(self._process.stdin.fileno(), self._backlog[:65536])]
        except BlockingIOError:
            return
        except OSError:
            self._give_up()

    def _listen(self) -> None:
        """Passes on whole lines that the child has said."""
        if self._process is None:
            return
        assert self._process.stdout is not None
        try:
            while part := os.read(self._process.stdout.fileno(), 4096):
                self._heard += part
        except BlockingIOError:
            pass
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            self._say(line.decode(errors="replace"))

    def _give_up(self) -> None:
        """The child is gone: says so once, and from then on there is no such tracker."""
        self._listen()
        self._process, process = None, self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
        self._backlog.clear()
        self._say(f"{self.name} ended early and is left out from here on (see {self._log_path}); metrics.jsonl goes on")
