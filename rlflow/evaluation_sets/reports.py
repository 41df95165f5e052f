"""What measurements leave: results.json, a table for people, of several checkpoints a curve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlflow.evaluation_sets.measuring import SetResult
from rlflow.tracking.charts import standalone
from rlflow.tracking.history import Series

RESULTS, CURVE = "results.json", "curve.svg"
_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One model, measured."""

    label: str
    """What tables call it: ``step 120``, or a model's name."""
    step: int | None
    path: str
    results: Sequence[SetResult]


def write_results(directory: Path, measurements: Sequence[Measurement]) -> Path:
    """Writes all of them as one JSON file, and a curve where there are several steps."""
    path = directory / RESULTS
    path.write_text(json.dumps([as_json(one) for one in measurements], indent=1) + "\n", encoding="utf-8")
    series = list(curves(measurements))
    if series:
        (directory / CURVE).write_text(standalone(series), encoding="utf-8")
    return path


def as_json(measurement: Measurement) -> dict[str, Any]:
    results = [result.as_json() for result in measurement.results]
    return {"model": measurement.path, "label": measurement.label, "step": measurement.step, "results": results}


def curves(measurements: Sequence[Measurement]) -> list[Series]:
    """Each metric of each set over the steps, where there are several."""
    points: dict[str, list[tuple[float, float]]] = {}
    for one in measurements:
        if one.step is None:
            continue
        for result in one.results:
            for metric, found in result.estimates.items():
                points.setdefault(f"{result.name}/{metric}", []).append((float(one.step), found.value))
    return [Series(name, tuple(of_one), of_one[-1][1]) for name, of_one in points.items() if len(of_one) > 1]


def table(measurements: Sequence[Measurement]) -> str:
    """A line a model, set and metric, in columns."""
    rows = [("model", "set", "metric", "score", "95% interval", "problems", "samples")]
    for one in measurements:
        for result in one.results:
            for metric, found in result.estimates.items():
                interval = f"{100 * found.low:.1f} to {100 * found.high:.1f}%"
                counts = (f"{result.num_problems:,}", str(result.samples))
                rows.append((one.label, result.name, metric, f"{100 * found.value:.1f}%", interval, *counts))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *sparklines(measurements), *remarks(measurements)])


def sparklines(measurements: Sequence[Measurement]) -> list[str]:
    """A line a metric over the steps: its curve in characters, from the lowest to the highest."""
    lines = []
    for series in curves(measurements):
        values = [value for _, value in series.points]
        low, spread = min(values), max(values) - min(values)
        heights = [round((value - low) / spread * 7) + 1 if spread else 4 for value in values]
        drawn = "".join(_BARS[height] for height in heights)
        lines.append(f"{series.name}  {drawn}  {100 * values[0]:.1f}% -> {100 * values[-1]:.1f}%")
    return lines


def remarks(measurements: Sequence[Measurement]) -> list[str]:
    """What makes a score another than it seems."""
    lines = []
    for one in measurements:
        for result in one.results:
            for fact, what in (("truncated", "were cut at max_new_tokens"), ("unscored", "could not be scored")):
                if result.facts.get(fact, 0) > 0.01:
                    share = f"{100 * result.facts[fact]:.0f}% of the completions"
                    lines.append(f"note: {one.label}, {result.name}: {share} {what}, and count as not passed")
    return [line for line in lines if "cut at" not in line] + [
        line.replace(", and count as not passed", "") for line in lines if "cut at" in line
    ]
