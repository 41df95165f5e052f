"""SwanLab, in its own process: see child_process.py."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any


class Sink:
    """One SwanLab experiment; what it has no number for (NaN, infinity) it is not told.

    Args:
        arguments: Of ``swanlab.init``.
    """

    def __init__(self, arguments: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._swanlab: Any = importlib.import_module("swanlab")
        self._run = self._swanlab.init(**arguments)
        where = f"`swanlab sync` uploads what is in {arguments['log_dir']}" if arguments["mode"] == "offline" else ""
        say(f"swanlab: {arguments['mode'] or 'online'}{': ' if where else ''}{where}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if finite:
            self._run.log(finite, step=step)

    def show(
        self,
        step: int,
        histograms: Mapping[str, tuple[Sequence[int], Sequence[float]]],
        samples: Sequence[Mapping[str, Any]],
    ) -> None:
        shown: dict[str, Any] = {name: self._bars(counts, edges) for name, (counts, edges) in histograms.items()}
        if samples:
            table = self._swanlab.echarts.Table()
            columns = list(samples[0])
            table.add(columns, [[_shown(sample[column]) for column in columns] for sample in samples])
            shown["rollouts/samples"] = table
        if shown:
            self._run.log(shown, step=step)

    def finish(self, summary: Mapping[str, float], *, is_whole: bool) -> None:
        self._run.finish(state="success" if is_whole else "crashed")

    def _bars(self, counts: Sequence[int], edges: Sequence[float]) -> Any:
        """A histogram, which SwanLab draws as a chart of bars."""
        bars = self._swanlab.echarts.Bar()
        bars.add_xaxis([f"{(low + high) / 2:.4g}" for low, high in pairwise(edges)])
        bars.add_yaxis("rollouts", list(counts))
        return bars


def _shown(value: Any) -> str | int | float:
    return "" if value is None else value
