"""RewardProcess: one child process, from the server's side. Never blocks; its pool decides when it has to die."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlflow.actors.reward_wire import frame, take_frames
from rlflow.tracking.logs import output_is_logged
from rlflow.tracking.redact import holds_secret, is_secret_name, redact_text
from rlflow.tracking.visible import one_line

LOG_TAIL_BYTES = 4096
ECHO_BYTES = 1 << 20
"""Of what a process prints, this much is in its server's log."""
REAP_TIMEOUT_S = 5.0


ALLOWED = re.compile(
    r"""
    PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|TZ|TMPDIR|TMP|TEMP|LD_LIBRARY_PATH|LD_PRELOAD|VIRTUAL_ENV|CONDA_PREFIX
    |(?:HTTP|HTTPS|ALL|NO)_PROXY|(?:http|https|all|no)_proxy|SSL_CERT_FILE|SSL_CERT_DIR|(?:REQUESTS|CURL)_CA_BUNDLE
    |NLTK_DATA|MODELSCOPE_CACHE
    |(?:LC|XDG|OMP|MKL|OPENBLAS|NUMEXPR|KMP|GOMP|TOKENIZERS|HF|TRANSFORMERS|TRITON|CUDA|NVIDIA|HIP|ROCR|HSA)_.*
    |(?:PYTHON|TORCH|PYTORCH).*
    """,
    re.VERBOSE,
)
"""Variables that a reward may need and that hold no secret: where things are, how many threads, which GPU."""
MARK = "RLFLOW_REWARD_PROCESS"
_START_S = 0.01
KILL_ROUNDS = 20
"""So often what a process left behind is looked for, while it starts new ones."""
MAX_MESSAGE = 500


def child_environment(environment: Mapping[str, str], wanted: Sequence[str] = ()) -> dict[str, str]:
    """The environment of a reward child: what is `ALLOWED` and looks like no secret, and what the recipe names.

    Args:
        environment: Of the process that starts the child.
        wanted: Names of further variables, which may be secrets; those that are not set stay so.
    """
    kept = {
        name: value
        for name, value in environment.items()
        if ALLOWED.fullmatch(name) and not is_secret_name(name) and not holds_secret(value)
    }
    kept |= {name: environment[name] for name in wanted if name in environment}
    packages = str(Path(__file__).absolute().parents[2])
    inherited = kept["PYTHONPATH"].split(os.pathsep) if "PYTHONPATH" in kept else []
    return kept | {"PYTHONPATH": os.pathsep.join([packages, *inherited]), "OMP_NUM_THREADS": "1"}


class RewardProcess:
    """A process group of its own. Whatever a reward function starts dies with it: its group, and what left the group
    for a session of its own, which is known by a variable that it inherited.

    Must be made on a thread that outlives it: Linux delivers the parent-death signal when that thread ends.
    """

    def __init__(
        self, setup: bytes, environment: Mapping[str, str], module: str = "rlflow.actors.reward_child"
    ) -> None:
        """
        Args:
            setup: The first thing that the process is told.
            module: What it runs.
        """
        self._mark = secrets.token_hex(16)
        self._connection, theirs = socket.socketpair()
        self._log, log_end = os.pipe()
        try:
            self._process = subprocess.Popen(
                # -u: what a function prints is there when it has printed it.
                [sys.executable, "-u", "-P", "-m", module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log_end,
                stderr=log_end,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env={**environment, MARK: self._mark},
            )
        finally:
            theirs.close()
            os.close(log_end)
        self._connection.setblocking(False)
        os.set_blocking(self._log, False)
        self._log_open = True
        self._log_tail = self._unended = b""
        self._echo_left = ECHO_BYTES
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

    @property
    def shared_bytes(self) -> int:
        """Shared memory that it holds now, which no resource limit counts; 0 where /proc does not tell."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8").splitlines():
                if line.startswith("RssShmem:"):
                    return int(line.split()[1]) << 10
        return 0

    def send(self, call_id: int, body: bytes) -> None:
        """Queues one frame; `advance` writes it."""
        assert not self._outbound, "one request at a time"
        self._outbound = memoryview(frame(call_id, body))

    def send_descriptor(self, call_id: int, body: bytes, descriptor: int) -> None:
        """Sends one short frame with a descriptor at once.

        Raises:
            OSError: It cannot be sent: the process is gone, or does not read.
        """
        assert not self._outbound, "one request at a time"
        socket.send_fds(self._connection, [frame(call_id, body)], [descriptor])

    @property
    def descriptors(self) -> tuple[int, int]:
        """What `advance` reads: the answers, and what is printed."""
        return self._connection.fileno(), self._log

    def register(self, selector: selectors.BaseSelector) -> None:
        """Adds what `advance` waits for."""
        if not self.closed:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outbound else 0)
            selector.register(self._connection, events)
        if self._log_open:
            selector.register(self._log, selectors.EVENT_READ)

    def advance(self) -> list[tuple[int, dict[str, Any]]]:
        """Moves what can be moved without waiting; returns the answers that are complete, by call id.

        What they say in words has lost its secrets.
        """
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
            answers = [(call_id, dict(json.loads(body))) for call_id, body in take_frames(self._inbound)]
        except ValueError:
            self.closed = True
            return []
        return [(call_id, {key: _clean(value) for key, value in said.items()}) for call_id, said in answers]

    def kill(self) -> str:
        """Kills the process and what it started; returns how it had ended, and the last line it had printed."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        was_empty = False
        for _ in range(KILL_ROUNDS):
            left = _marked(f"{MARK}={self._mark}".encode())
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not left and was_empty:
                break
            # A program that is just being started has no environment yet.
            was_empty = not left
            time.sleep(_START_S)
        try:
            code = self._process.wait(REAP_TIMEOUT_S)
            ending = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        except subprocess.TimeoutExpired:
            ending = "cannot be killed"
        self._drain_log()
        self._connection.close()
        os.close(self._log)
        lines = self._log_tail.decode(errors="replace").split("\n")
        last_line = _clean(next((line.strip() for line in reversed(lines) if line.strip()), ""))
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
            self._echo(part)

    def _echo(self, part: bytes) -> None:
        """Passes what functions print on to the server's own log, whole lines, where it has one: not for ever."""
        if self._echo_left <= 0 or not output_is_logged():
            return
        whole, end, self._unended = (self._unended + part).rpartition(b"\n")
        if len(self._unended) > LOG_TAIL_BYTES:
            whole, end, self._unended = whole + end + self._unended, b"\n", b""
        if not end:
            return
        self._echo_left -= len(whole)
        notice = b"" if self._echo_left > 0 else f"what process {self.pid} prints is left out from here on\n".encode()
        with open(2, "wb", closefd=False) as log:
            log.write(whole + end + notice)


def _marked(mark: bytes) -> list[int]:
    """Process ids of this user's processes that were started with the mark in their environment, where /proc tells."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        # Others' processes and those that have just ended cannot be read; a zombie's environment is empty.
        with contextlib.suppress(OSError):
            if mark in path.read_bytes():
                pids.append(int(path.parent.name))
    return pids


def _clean(said: Any) -> Any:
    """Words without their secrets and of moderate length; anything else as it is."""
    return one_line(redact_text(said))[:MAX_MESSAGE] if isinstance(said, str) else said
