"""One run a directory: a lock file says who has it.

The kernel's lock on the file decides (flock): it ends with the process that holds it, however that dies, and file
systems that nodes share pass it on (NFS, Lustre mounted with ``flock``). Where a file system has no locks, what the
file says decides: host, process and when that process began.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from rlflow.driver.errors import RunError

LOCK = ".rlflow.lock"
_TRIES = 10


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has a directory, or had it."""

    host: str
    pid: int
    began: str
    """When the process began, in the kernel's own count: process ids come again."""
    since: str
    """When it took the directory, for people."""

    @classmethod
    def of_process(cls, pid: int) -> Holder:
        """A process of this machine, as it would be written down now; ``began`` is empty where there is none."""
        return cls(socket.gethostname(), pid, _began(pid), time.strftime("%Y-%m-%d %H:%M:%S"))

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this machine."""
        return self.host == socket.gethostname()

    @property
    def is_alive(self) -> bool:
        """Whether it may still run: of another host nobody knows."""
        return not self.is_here or _began(self.pid) == self.began

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class RunLock:
    """A run's hold on a directory, from `take` to `release`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.left_by: Holder | None = None
        """A process that had the directory and ended without giving it back."""
        self._made: list[Path] = []
        """Directories that were not there before, the outermost first."""
        self._file: TextIO | None = None

    def take(self) -> None:
        """Makes the directory where it is missing, and locks it.

        Raises:
            RunError: Another process has it: which one.
        """
        missing = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        self._made = list(reversed(missing))
        for _ in range(_TRIES):
            self.directory.mkdir(parents=True, exist_ok=True)
            file = (self.directory / LOCK).open("a+", encoding="utf-8")
            try:
                self.left_by = self._lock(file)
            except RunError:
                file.close()
                raise
            if self._is_in_place(file):
                self._file = file
                break
            # Whoever had it gave it back, and removed the file, between our two calls.
            file.close()
        else:
            raise RunError(f"{self.directory} could not be locked in {_TRIES} tries: others take it and give it back")
        file.truncate(0)
        file.write(json.dumps(asdict(Holder.of_process(os.getpid()))) + "\n")
        file.flush()

    def release(self) -> None:
        """Gives the directory back, and removes what `take` made and nobody filled."""
        if self._file is None:
            return
        if self._is_in_place(self._file):
            (self.directory / LOCK).unlink()
        self._file.close()
        self._file = None
        for path in reversed(self._made):
            try:
                path.rmdir()
            except OSError:
                break

    def _lock(self, file: TextIO) -> Holder | None:
        """Returns who had it and is gone. Raises RunError when somebody has it."""
        said = _read(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(self._taken(said, "stop that")) from None
        except OSError:
            if said is not None and said.is_alive:
                remedy = f"stop that, remove {self.directory / LOCK} where it is gone"
                raise RunError(self._taken(said, remedy)) from None
        return said

    def _taken(self, holder: Holder | None, remedy: str) -> str:
        who = holder or "another process"
        return f"{self.directory} is in use by {who}: {remedy}, or choose another run.output_dir"

    def _is_in_place(self, file: TextIO) -> bool:
        """Whether the file that is open is the one that the directory has."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.directory / LOCK))
        except FileNotFoundError:
            return False


def holder_of(directory: Path) -> Holder | None:
    """Who has a run's directory, or had it and was killed, as its lock file says; None where there is none.

    The lock itself is not touched: who tried it for a moment would keep a run from starting.
    """
    try:
        with (directory / LOCK).open(encoding="utf-8") as file:
            return _read(file)
    except OSError:
        return None


def _read(file: TextIO) -> Holder | None:
    file.seek(0)
    try:
        return Holder(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None


def _began(pid: int) -> str:
    """Clock ticks from the machine's start to the process's; empty when there is none of that number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return ""
