"""What came of the answers so far, in a line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class Tally:
    """Counts answers, and means of rewards over those that have one."""

    def __init__(self) -> None:
        self.num_answers = self.num_cut = 0
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            self.num_answers += 1
            self.num_cut += row["finish_reason"] == "length"
            for label, value in row.get("rewards", {}).items():
                total, count = self._sums.get(label, (0.0, 0))
                self._sums[label] = (total, count) if value is None else (total + value, count + 1)

    @property
    def line(self) -> str:
        parts = [f"{self.num_answers:,} answers"]
        if self.num_cut:
            parts.append(f"{self.num_cut:,} cut at the longest")
        for label, (total, count) in self._sums.items():
            unscored = self.num_answers - count
            mean = f"{total / count:.3f}" if count else "unscored"
            parts.append(f"{label} {mean}" + (f" ({unscored:,} unscored)" if unscored and count else ""))
        return ", ".join(parts)
