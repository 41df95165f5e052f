"""Runs Python that a policy wrote, where it can do no harm.

    no network, no home directory, no environment, no other process, no file but read-only system directories and a
    small /tmp; limits on time, memory, processes, files and output; whatever it started ends with it

The kernel's namespaces do it, for users and for root alike. Where they are not to be had, nothing is run: see
`require_isolation`. Only a machine of one's own that holds nothing of worth should run with ``unsafe``.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rlflow.rewards.resolving import RewardError
from rlflow.rewards.sandbox_child import NOT_ISOLATED

_RUNNER = """\
import os, sys
_source = os.read(0, 1 << 24).decode()
while _part := os.read(0, 1 << 24).decode(): _source += _part
_mark, _source = _source.split("\\n", 1)
_out = os.dup(1)
_null = os.open("/dev/null", os.O_RDWR)
for _end in (0, 1): os.dup2(_null, _end)
exec(compile(_source, "program", "exec"), {"__name__": "__main__"})
os.write(_out, _mark.encode())
os._exit(0)
"""
"""Reads a mark and the program; writes the mark when the program has come to its end. What it prints is dropped."""
_MAX_WORDS = 2000
_GRACE_S = 2.0
"""What namespaces and an interpreter take to start, beyond the program's own time."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use."""

    timeout_s: float = 10.0
    memory_gib: float = 1.0
    processes: int = 16
    disk_mib: int = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a program."""

    passed: bool
    """It came to its end: nothing raised, nobody left early."""
    reason: str
    """Why it did not: the last line that it said, or which limit ended it."""


def run_python(program: str, limits: Limits, *, unsafe: bool = False) -> Outcome:
    """Runs a program to its end, or to a limit.

    Args:
        unsafe: Run it as a plain child process with limits alone: it can read and write what its user can.

    Raises:
        RewardError: This machine does not isolate processes.
    """
    mark = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="rlflow-sandbox-") as root:
        command = _unsafe_command(limits) if unsafe else _command(root, limits)
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"LANG": "C.UTF-8"},
            cwd=root,
            start_new_session=True,
        )
        said, words, is_late = _communicate(process, f"{mark}\n{program}".encode(), limits.timeout_s + _GRACE_S)
    text = words.decode(errors="replace").strip()
    if process.returncode == NOT_ISOLATED:
        raise RewardError(f"this machine does not isolate what a policy wrote ({text or 'no reason given'}): {_REMEDY}")
    if is_late:
        return Outcome(False, f"took more than {limits.timeout_s:g} s")
    if said == mark.encode():
        return Outcome(True, "")
    last = text.splitlines()[-1] if text else f"it ended early, with exit code {process.returncode}"
    return Outcome(False, last[:300])


_REMEDY = (
    "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, or docker run --security-opt "
    "seccomp=unconfined), run as root with CAP_SYS_ADMIN, or, where nothing is to be lost, set unsafe: true"
)


@cache
def require_isolation() -> None:
    """
    Raises:
        RewardError: Programs cannot be isolated here; with a remedy.
    """
    outcome = run_python("pass", Limits())
    if not outcome.passed:
        raise RewardError(f"a program that does nothing does not end well in the sandbox: {outcome.reason}")


def _communicate(process: subprocess.Popen[bytes], data: bytes, timeout_s: float) -> tuple[bytes, bytes, bool]:
    """Feeds a process and hears it out, however much it says. Kills what is left of it.

    Returns:
        The first of what it wrote to stdout, the last of what it wrote to stderr, and whether the time was up.
    """
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    deadline, said, words, is_late = time.monotonic() + timeout_s, b"", b"", False
    waiting = memoryview(data)
    try:
        with selectors.DefaultSelector() as selector:
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin, selectors.EVENT_WRITE)
            selector.register(process.stdout, selectors.EVENT_READ)
            selector.register(process.stderr, selectors.EVENT_READ)
            while selector.get_map() and not is_late:
                for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                    if key.fileobj is process.stdin:
                        waiting = _write(process.stdin.fileno(), waiting)
                        if not waiting:
                            selector.unregister(process.stdin)
                            process.stdin.close()
                        continue
                    part = os.read(key.fd, 1 << 16)
                    if not part:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is process.stdout:
                        said = (said + part)[:_MAX_WORDS]
                    else:
                        words = (words + part)[-_MAX_WORDS:]
                is_late = time.monotonic() >= deadline
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(_GRACE_S)
        for end in (process.stdin, process.stdout, process.stderr):
            end.close()
    return said, words, is_late


def _write(descriptor: int, data: memoryview) -> memoryview:
    """Writes what can be written now. Returns what is left of it: nothing where nobody reads any more."""
    try:
        return data[os.write(descriptor, data) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return data[:0]


def _command(root: str, limits: Limits) -> list[str]:
    settings = {
        "root": root,
        "readable": _readable(),
        "python": _interpreter(),
        "runner": _RUNNER,
        "memory_bytes": int(limits.memory_gib * 2**30),
        "disk_bytes": limits.disk_mib << 20,
        "processes": limits.processes,
        "cpu_s": int(limits.timeout_s + _GRACE_S) + 1,
    }
    child = Path(__file__).with_name("sandbox_child.py")
    return [_interpreter(), "-I", "-S", "-B", str(child), json.dumps(settings)]


def _unsafe_command(limits: Limits) -> list[str]:
    kibibytes, seconds = int(limits.memory_gib * 2**20), int(limits.timeout_s) + 1
    ulimits = f"ulimit -v {kibibytes}; ulimit -t {seconds}; ulimit -c 0"
    return ["/bin/sh", "-c", f'{ulimits}; exec "$0" -I -S -B -c "$1"', _interpreter(), _RUNNER]


def _interpreter() -> str:
    """Python itself, behind a virtual environment's link."""
    return os.path.realpath(sys.executable)


def _readable() -> list[str]:
    """What the interpreter needs, from the outermost in."""
    system = ["/usr", "/bin", "/lib", "/lib32", "/lib64"]
    own = [sys.base_prefix, sysconfig.get_path("stdlib"), os.path.dirname(_interpreter())]
    return system + [path for path in dict.fromkeys(own) if not path.startswith("/usr/")]
