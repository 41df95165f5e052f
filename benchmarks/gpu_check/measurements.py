"""What a part measures: numbers with bounds, written as they come, so that a crash loses none."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path


class Skip(Exception):
    """The part cannot run here, for a reason that is not a fault."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One number. Without bounds it is for information."""

    name: str
    value: float | str
    unit: str = ""
    most: float | None = None
    """The largest value that is right."""
    least: float | None = None
    """The smallest value that is right."""

    @property
    def is_right(self) -> bool:
        """Whether it lies within its bounds; NaN does not."""
        if isinstance(self.value, str):
            return True
        is_small_enough = self.most is None or self.value <= self.most
        is_large_enough = self.least is None or self.value >= self.least
        return is_small_enough and is_large_enough and not math.isnan(self.value)

    @property
    def shown(self) -> str:
        """The value and its unit."""
        value = self.value if isinstance(self.value, str) else f"{self.value:.4g}"
        return f"{value} {self.unit}".rstrip()

    @property
    def wanted(self) -> str:
        """The bounds."""
        least = "" if self.least is None else f">= {self.least:.4g}"
        most = "" if self.most is None else f"<= {self.most:.4g}"
        return " and ".join(filter(None, [least, most]))


class Record:
    """Where a part puts what it measures."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        """For the part's own files."""
        self._path = directory / "measurements.jsonl"

    def add(
        self, name: str, value: float | str, unit: str = "", *, most: float | None = None, least: float | None = None
    ) -> None:
        """Writes one number down at once."""
        number = value if isinstance(value, str) else float(value)
        self._append(asdict(Measurement(name, number, unit, most, least)))

    def skip(self, reason: str) -> None:
        """Writes down why the rest was left out."""
        self._append({"skipped": reason})

    def _append(self, line: dict) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_measurements(path: Path) -> tuple[list[Measurement], str]:
    """What a part wrote: its numbers, and why it left something out, empty when it did not."""
    measured: list[Measurement] = []
    skipped = ""
    for line in path.read_text().splitlines() if path.exists() else []:
        entry = json.loads(line)
        if "skipped" in entry:
            skipped = entry["skipped"]
        else:
            measured.append(Measurement(**entry))
    return measured, skipped
