"""The logs of a run: what each actor printed, in RUN/logs/, written by log_process.py and read by people.

run.log              what the run said
rollout-0.log        everything that the actor rollout[0] and its children printed, those started again included
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rlflow.tracking.history import RECIPE, HistoryError
from rlflow.tracking.log_process import MARK, Log, readable_line
from rlflow.tracking.redact import redact_text

DIRECTORY = "logs"
LAST_LINES = 8
LONGEST_SHOWN = 300
"""Characters of a line in an error's text."""
END_S = 2.0
"""How long an error waits for what an actor that has just died had still said."""
POLL_S = 0.2
_BLOCK = 1 << 16


def log_path(directory: Path, actor: str) -> Path:
    """Args: directory: ``RUN/logs``. actor: ``rollout[0]``."""
    return directory / f"{actor.replace('[', '-').rstrip(']')}.log"


_logged: list[Path] = []
"""Where this process's output goes, once it does."""


def output_is_logged() -> bool:
    """Whether what this process prints goes to an actor's log."""
    return bool(_logged)


def send_output_to(path: Path, actor: str, secrets: Sequence[str]) -> None:
    """From here on, what this process and its children print goes to a log.

    Where the log cannot be written, output stays where it was, and says so.

    Args:
        secrets: What is left out of it, beside the values of this process's secret variables.
    """
    who = f"{actor}: process {os.getpid()} on {socket.gethostname()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        print(f"{actor}: {path} cannot be written ({error.strerror}): its output stays here", file=sys.stderr)
        return
    # Here, not in the process that begins to write later: whoever looks meanwhile sees whose words those before are.
    Log(path, redact_text).mark(f"{who} starts")
    reading, writing = os.pipe()
    # -S: it needs no installed package; -I: nothing from the current directory.
    python = [sys.executable, "-S", "-I", str(Path(__file__).with_name("log_process.py"))]
    # Ray kills the children of an actor that it ends: this process is not to be one of them.
    subprocess.run(
        ["/bin/sh", "-c", 'exec 3<&0; "$@" <&3 3<&- &', "sh", *python],
        stdin=reading,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        check=True,
    )
    os.close(reading)
    about = {"path": str(path), "who": who, "secrets": list(secrets)}
    with open(writing, "wb", closefd=False) as pipe:
        pipe.write(json.dumps(about).encode() + b"\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    os.close(writing)
    _logged.append(path)


def last_words(path: Path, wait_s: float = END_S) -> str:
    """What an actor that has died said last, and where the rest is, as the end of a sentence."""
    deadline = time.monotonic() + wait_s
    while path.exists() and not _has_ended(path) and time.monotonic() < deadline:
        time.sleep(0.02)
    if not path.exists():
        return f"its log is {path}, on the node that it ran on"
    lines = last_lines(path, 4 * LAST_LINES)
    # What came before is of another process.
    starts = [i for i, line in enumerate(lines) if line.startswith(MARK) and line.endswith(" starts")]
    own = [line for line in lines[starts[-1] if starts else 0 :] if line.strip() and not line.startswith(MARK)]
    if not own:
        return f"it left nothing in {path}"
    shown = "".join(f"\n    {line[:LONGEST_SHOWN]}" for line in own[-LAST_LINES:])
    return f"{path} ends with:{shown}"


def _has_ended(path: Path) -> bool:
    (line,) = last_lines(path, 1) or [""]
    return line.startswith(MARK) and line.endswith(" has ended")


@dataclass(frozen=True, slots=True)
class LogFile:
    """One log of a run."""

    name: str
    """``run``, ``rollout-0``; of a run with stages ``grpo/rollout-0``."""
    path: Path
    size: int
    modified: float
    """Seconds since 1970."""


def find_logs(run: Path) -> list[LogFile]:
    """The logs of a run, or of all its stages in the order in which they were written to; ``run`` first of each.

    Raises:
        HistoryError: There is no run, or it has no logs.
    """
    stages = [run] if (run / DIRECTORY).is_dir() else sorted(run.glob(f"*/{DIRECTORY}"), key=_last_written)
    stages = [path.parent if path.name == DIRECTORY else path for path in stages]
    if not stages:
        is_run = (run / RECIPE).is_file()
        reason = f"is a run without {DIRECTORY}/" if is_run else "is no run's directory, nor that of its stages"
        raise HistoryError(f"{run} {reason}: give the directory that the recipe's run.output_dir names")
    found = []
    for stage in stages:
        prefix = "" if stage == run else f"{stage.name}/"
        paths = sorted((stage / DIRECTORY).glob("*.log"), key=lambda path: (path.stem != "run", _by_rank(path)))
        found += [_log_file(f"{prefix}{path.stem}", path) for path in paths]
    if not found:
        raise HistoryError(f"{run}: nothing is in {DIRECTORY}/ yet")
    return found


def choose_logs(logs: Sequence[LogFile], wanted: str) -> list[LogFile]:
    """Those that a person means: ``rollout-0``, ``rollout[0]``, ``grpo/rollout-0``, a whole role, or a whole stage.

    Where several stages have it, the newest stage's.

    Raises:
        HistoryError: There is none; the message lists those that there are.
    """
    name = wanted.removesuffix(".log").replace("[", "-").rstrip("]/")
    for matches in (
        [log for log in logs if log.name == name],
        [log for log in logs if log.name.rpartition("/")[2] == name],
        [log for log in logs if _role(log) == name or log.name.rpartition("-")[0] == name],
        [log for log in logs if log.name.startswith(f"{name}/")],
    ):
        if matches:
            newest = matches[-1].path.parent
            return [log for log in matches if log.path.parent == newest]
    raise HistoryError(f"no log is called {wanted}; there are {', '.join(log.name for log in logs)}")


def last_lines(path: Path, most: int) -> list[str]:
    """The last lines of a file, without escape codes and secrets; it is not read whole."""
    with path.open("rb") as file:
        position = file.seek(0, os.SEEK_END)
        tail = b""
        while position and tail.count(b"\n") <= most:
            size = min(_BLOCK, position)
            position = file.seek(position - size)
            tail = file.read(size) + tail
    lines = tail.decode(errors="replace").removesuffix("\n").split("\n") if tail else []
    return [redact_text(readable_line(line)) for line in deque(lines, maxlen=most)]


def follow(logs: Sequence[LogFile], *, poll_s: float = POLL_S) -> Iterator[tuple[LogFile, str] | None]:
    """What is added to the logs from now on, a line at a time, and None whenever there is nothing; without end.

    A log that begins anew, because it had become too large, is read from its beginning.
    """
    reached = {log.path: log.path.stat().st_size for log in logs}
    pending = dict.fromkeys(reached, b"")
    while True:
        for log in logs:
            with suppress(FileNotFoundError), log.path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < reached[log.path]:
                    reached[log.path] = 0
                file.seek(reached[log.path])
                added = file.read()
                reached[log.path] = file.tell()
                *lines, pending[log.path] = (pending[log.path] + added).split(b"\n")
                yield from ((log, redact_text(readable_line(line.decode(errors="replace")))) for line in lines)
        yield None
        time.sleep(poll_s)


def _log_file(name: str, path: Path) -> LogFile:
    status = path.stat()
    return LogFile(name, path, status.st_size, status.st_mtime)


def _last_written(logs: Path) -> float:
    """Of a stage's logs; of those that ran one after the other, the last."""
    return max((path.stat().st_mtime for path in logs.glob("*.log")), default=0.0)


def _role(log: LogFile) -> str:
    return log.name.rpartition("/")[2].rpartition("-")[0]


def _by_rank(path: Path) -> tuple[str, int]:
    role, _, rank = path.stem.rpartition("-")
    return (role, int(rank)) if rank.isdecimal() else (path.stem, 0)
