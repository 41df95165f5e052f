"""The directory that is shown. Names that come from a browser become paths here, and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from rlflow.driver.outcome import OUTCOME
from rlflow.driver.run_lock import LOCK
from rlflow.tracking.history import METRICS
from rlflow.ui.refusal import Refusal

MAX_DEPTH = 5
"""Directories below the served one in which runs are looked for."""
MAX_DIRECTORIES = 20_000
"""So many directories are looked into."""
_OF_A_RUN = frozenset({METRICS, OUTCOME, LOCK, "inputs.json"})
"""One of them is in the directory of every run."""


class Served:
    """A directory and everything below it, without what links in it lead out to."""

    def __init__(self, root: Path) -> None:
        """Raises NotADirectoryError, FileNotFoundError: There is no such directory."""
        self.root = root.resolve(strict=True)
        if not self.root.is_dir():
            raise NotADirectoryError(f"{root} is no directory")

    def run_names(self) -> list[str]:
        """Every run, as its path below the directory; ``.`` where the directory itself is one."""
        return sorted(self._walk(), key=lambda name: name.split("/"))

    def run(self, name: str) -> Path:
        """The directory of a run. Raises Refusal: there is no such run, or its name leads elsewhere."""
        directory = self._inside(self.root, name)
        if not is_run(directory):
            raise Refusal(404, f"there is no run {name}")
        return directory

    def file(self, name: str, part: str) -> Path:
        """A file of a run, which is there. Raises Refusal: it is not, or lies elsewhere."""
        path = self._inside(self.run(name), part)
        if not path.is_file():
            raise Refusal(404, f"{name} has no {part}")
        return path

    def name_of(self, directory: Path) -> str | None:
        """What a directory is called here; None when it is not below the served one."""
        resolved = directory.resolve()
        return resolved.relative_to(self.root).as_posix() if resolved.is_relative_to(self.root) else None

    def _inside(self, directory: Path, name: str) -> Path:
        try:
            path = (directory / name).resolve()
        except (ValueError, OSError, RuntimeError):
            raise Refusal(404, "that is no name of a file") from None
        if not name or Path(name).is_absolute() or not path.is_relative_to(directory):
            raise Refusal(404, f"{name[:200]} is not below the directory that is shown")
        return path

    def _walk(self) -> Iterator[str]:
        """Looks for runs; a run's own directories, links and hidden directories are left out."""
        pending: list[tuple[str, int]] = [(str(self.root), 0)]
        seen = 0
        while pending and seen < MAX_DIRECTORIES:
            directory, depth = pending.pop()
            seen += 1
            try:
                with os.scandir(directory) as listing:
                    entries = list(listing)
            except OSError:
                continue  # not ours to read, or just gone
            if any(entry.name in _OF_A_RUN for entry in entries):
                yield Path(directory).relative_to(self.root).as_posix()
            elif depth < MAX_DEPTH:
                below = [e for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)]
                pending += [(entry.path, depth + 1) for entry in below]


def is_run(directory: Path) -> bool:
    """Whether a directory is a run's, by the files in it."""
    return any((directory / name).is_file() for name in _OF_A_RUN)
