"""wandb, at arm's length: a child process owns the run, and nothing that happens to it is felt here.

log --non-blocking pipe, bounded backlog--> wandb_process.py --> wandb's service --> the cloud, or the disk
"""

from __future__ import annotations

import json
import netrc
import os
import secrets
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from rlflow.recipe import Recipe
from rlflow.tracking.redact import redact
from rlflow.tracking.tracker import Tracker
from rlflow.types import StepStats

BACKLOG_BYTES = 4 << 20
"""What waits for a slow child; steps beyond it are dropped and counted."""
FINISH_SECONDS = 10.0
"""How long the end of a run waits for what is left to be sent."""
DROPPED = "tracking/wandb_dropped_steps"


class WandbTracker(Tracker):
    """A wandb run in ``directory/wandb``, without network when there is no key.

    Args:
        recipe: Becomes the run's config, without its secrets.
        directory: The stage's run directory. The run's id is kept there: a resumed stage continues the same run.
        say: Where one-line notices go.
        finish_seconds: Deadline of ``close``.
    """

    def __init__(
        self, recipe: Recipe, directory: Path, *, say: Callable[[str], None], finish_seconds: float = FINISH_SECONDS
    ) -> None:
        self.dropped = 0
        self._say, self._finish_seconds = say, finish_seconds
        self._directory = directory / "wandb"
        self._directory.mkdir(exist_ok=True)
        self._log_path = self._directory / "process.log"
        self._backlog = bytearray()
        self._heard = b""
        self._process: subprocess.Popen[bytes] | None = self._start()
        self._send({"init": self._arguments(recipe, directory)})

    def log(self, stats: StepStats) -> None:
        metrics: dict[str, float | int] = {name: float(value) for name, value in stats.metrics.items()}
        if self.dropped:
            metrics[DROPPED] = self.dropped
        self._send({"metrics": metrics | {"step": stats.step}})
        self._listen()

    def finish(self, summary: Mapping[str, float]) -> None:
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
        process.stdin.close()
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            left = f"what it has not sent is in {self._directory}"
            self._say(f"wandb did not finish within {self._finish_seconds:g} s and was ended; {left}")
        self._listen()
        process.stdout.close()
        self._process = None
        if self.dropped:
            self._say(f"wandb was too slow for {self.dropped} steps; metrics.jsonl has them")

    def _start(self) -> subprocess.Popen[bytes]:
        script = Path(__file__).with_name("wandb_process.py")
        with self._log_path.open("ab") as log:
            process = subprocess.Popen(
                # -P keeps this package's directory off the child's import path; its own session keeps Ctrl-C away.
                [sys.executable, "-P", str(script)],
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

    def _arguments(self, recipe: Recipe, directory: Path) -> dict[str, Any]:
        parent = directory.parent.name
        return {
            "project": os.environ.get("WANDB_PROJECT", "rlflow"),
            "name": f"{parent}/{directory.name}" if recipe.stage else directory.name,
            "group": parent if recipe.stage else None,
            "dir": str(directory),
            "id": run_id(self._directory / "run_id"),
            "resume": "allow",
            "mode": wandb_mode(os.environ),
            "config": redact(recipe.model_dump(mode="json")),
        }

    def _send(self, message: dict[str, Any], *, droppable: bool = True) -> None:
        """Puts a line in the backlog and writes what the pipe takes."""
        if self._process is None:
            return
        line = json.dumps(message).encode() + b"\n"
        if droppable and len(self._backlog) + len(line) > BACKLOG_BYTES:
            if not self.dropped:
                self._say("wandb is too slow: steps are left out of it; metrics.jsonl has them all")
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
        """The child is gone: says so once, and from then on there is no wandb."""
        self._listen()
        self._process, process = None, self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
        self._backlog.clear()
        self._say(f"wandb ended early and is left out from here on (see {self._log_path}); metrics.jsonl goes on")


def run_id(path: Path) -> str:
    """The id kept at ``path``, made the first time."""
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()


def wandb_mode(environ: Mapping[str, str]) -> Literal["offline"] | None:
    """``offline`` when neither environment nor netrc holds a key; None leaves the choice to wandb's own settings."""
    if environ.get("WANDB_MODE") or environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return None
    host = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    path = Path(environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return None if netrc.netrc(path).authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"
