"""RewardProcess: one child process, from the server's side. Never blocks; its pool decides when it has to die."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlflow.actors.reward_wire import frame, take_frames

SECRET_NAME = re.compile(r"_KEY$|_TOKEN$|ACCESS_KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
SECRET_VALUE = re.compile(r"://[^/@\s]+@")
LOG_TAIL_BYTES = 4096
REAP_TIMEOUT_S = 5.0


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns an environment without secrets (by name, or a URL with a password) in which `rlflow` can be imported."""
    kept = {
        name: value
        for name, value in environment.items()
        if not SECRET_NAME.search(name) and not SECRET_VALUE.search(value)
    }
    packages = str(Path(__file__).absolute().parents[2])
    inherited = kept["PYTHONPATH"].split(os.pathsep) if "PYTHONPATH" in kept else []
    return kept | {"PYTHONPATH": os.pathsep.join([packages, *inherited]), "OMP_NUM_THREADS": "1"}


class RewardProcess:
    """A process group of its own: whatever a reward function forks dies with it.

    Must be made on a thread that outlives it: Linux delivers the parent-death signal when that thread ends.
    """

    def __init__(self, setup: bytes) -> None:
        self._connection, theirs = socket.socketpair()
        self._log, log_end = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rlflow.actors.reward_child", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log_end,
                stderr=log_end,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=child_environment(os.environ),
            )
        finally:
            theirs.close()
            os.close(log_end)
        self._connection.setblocking(False)
        os.set_blocking(self._log, False)
        self._log_open = True
        self._log_tail = b""
        self._outbound = memoryview(b"")
        self._inbound = bytearray()
        self.started = time.monotonic()
        self.closed = False
        """The other end of the socket is gone, or said something that is no frame."""
        self.send(0, setup)

    @property
    def pid(self) -> int:
        """Of the process, and of its group."""
        return self._process.pid

    def send(self, call_id: int, body: bytes) -> None:
        """Queues one frame; `advance` writes it."""
        assert not self._outbound, "one request at a time"
        self._outbound = memoryview(frame(call_id, body))

    def register(self, selector: selectors.BaseSelector) -> None:
        """Adds what `advance` waits for."""
        if not self.closed:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outbound else 0)
            selector.register(self._connection, events)
        if self._log_open:
            selector.register(self._log, selectors.EVENT_READ)

    def advance(self) -> list[tuple[int, dict[str, Any]]]:
        """Moves what can be moved without waiting; returns the answers that are complete, by call id."""
        self._drain_log()
        if self.closed:
            return []
        try:
            if self._outbound:
                self._outbound = self._outbound[self._connection.send(self._outbound) :]
        except BlockingIOError:
            pass
        except OSError:
            self._outbound = memoryview(b"")  # the read below sees the end, after what was still said
        try:
            part = self._connection.recv(1 << 20)
            self._inbound += part
            self.closed = part == b""
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        try:
            return [(call_id, dict(json.loads(body))) for call_id, body in take_frames(self._inbound)]
        except ValueError:
            self.closed = True
            return []

    def kill(self) -> str:
        """Kills the process group; returns how the process had ended, and the last line it had printed."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        try:
            code = self._process.wait(REAP_TIMEOUT_S)
            ending = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        except subprocess.TimeoutExpired:
            ending = "cannot be killed"
        self._drain_log()
        self._connection.close()
        os.close(self._log)
        lines = self._log_tail.decode(errors="replace").split("\n")
        last_line = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{ending}; last words: {last_line[:300]}" if last_line else ending

    def _drain_log(self) -> None:
        """Reads a bounded amount, so that a function that prints for ever cannot hold the server."""
        for _ in range(64):
            if not self._log_open:
                return
            try:
                part = os.read(self._log, 1 << 16)
            except BlockingIOError:
                return
            self._log_open = part != b""
            self._log_tail = (self._log_tail + part)[-LOG_TAIL_BYTES:]
