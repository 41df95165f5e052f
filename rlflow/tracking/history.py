"""A run directory read back: its stages, their metrics as series over steps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from rlflow.tracking.jsonl import read_metrics
from rlflow.tracking.redact import redact
from rlflow.tracking.rollout_files import rollout_files

METRICS, RECIPE = "metrics.jsonl", "recipe.yaml"


class HistoryError(ValueError):
    """A directory that holds no run, or a metric that it lacks."""


@dataclass(frozen=True, slots=True)
class Series:
    """One metric over steps."""

    name: str
    points: tuple[tuple[float, float], ...]
    """(step, value), finite values only."""
    last: float = math.nan
    """The value at the last step that has the metric; NaN where that was no finite number."""


@dataclass(frozen=True)
class StageHistory:
    """What one stage left."""

    name: str
    directory: Path
    recipe: dict[str, Any]
    """The resolved recipe without its secrets; empty when the file is missing."""
    steps: tuple[dict[str, float], ...]
    """A mapping a step, in order; NaN where a value was not finite."""

    @property
    def times(self) -> list[float]:
        """When each step ended, in seconds since 1970; 0 where a line does not say."""
        return [row.get("time", 0.0) for row in self.steps]

    @cached_property
    def points(self) -> dict[str, list[tuple[float, float]]]:
        """(step, value) of every metric, in the order in which it first appeared."""
        found: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for row in self.steps:
            step = row["step"]
            for key, value in row.items():
                found[key].append((step, value))
        return {key: points for key, points in found.items() if key not in ("step", "time")}

    @property
    def keys(self) -> list[str]:
        """Every metric, in the order in which it first appeared."""
        return list(self.points)

    def series(self, key: str) -> Series:
        """One metric, without a point where no step has it."""
        return self._series.get(key, Series(key, ()))

    @cached_property
    def _series(self) -> dict[str, Series]:
        return {
            key: Series(key, tuple(point for point in points if math.isfinite(point[1])), last=points[-1][1])
            for key, points in self.points.items()
        }

    def last(self, key: str) -> float:
        """The newest finite value; NaN when there is none."""
        points = self.series(key).points
        return points[-1][1] if points else math.nan

    def evaluations(self) -> list[tuple[str, float, float, float, float]]:
        """(metric, first step, first value, last step, last value) of every ``eval/`` key, but for shares of what
        went wrong that were always 0.

        A value is NaN where it was no finite number.
        """
        rows = []
        for key, points in self.points.items():
            if is_result(key) or (key.startswith("eval/") and any(value != 0 for _, value in points)):
                rows.append((key.removeprefix("eval/"), *points[0], *points[-1]))
        return rows

    def rollout_files(self) -> list[Path]:
        """Parquet files in the order of their steps."""
        return list(rollout_files(self.directory).values())


def is_result(key: str) -> bool:
    """Whether it says how well a policy did on held-out data: 0 is worth telling, too."""
    return key.startswith("eval/") and not key.endswith("_fraction")


def read_stages(run_directory: Path) -> list[StageHistory]:
    """The stages of a run, in the order in which they ran; a run without stages is one.

    Raises:
        HistoryError: There is no metrics.jsonl in the directory, nor in one directly below.
    """
    if not run_directory.is_dir():
        wrong = "is a file" if run_directory.exists() else "there is no such directory"
        raise HistoryError(f"{run_directory}: {wrong}: give the directory that the recipe's run.output_dir names")
    paths = [path for path in (run_directory / METRICS, *run_directory.glob(f"*/{METRICS}")) if path.is_file()]
    stages = [read_stage(path.parent) for path in paths]
    stages = sorted((stage for stage in stages if stage.steps), key=lambda stage: stage.times[0])
    if not stages:
        raise HistoryError(
            f"{run_directory}: no {METRICS} with a step in it, here or one directory below. "
            "Give the directory that the recipe's run.output_dir names; a run has one after its first step, if "
            "`tracking` has jsonl"
        )
    return stages


def bucket(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most ``most`` points: means over equal numbers of neighbours; the first and the last point stay."""
    if len(points) <= most:
        return list(points)
    inner, size = points[1:-1], (len(points) - 2) / (most - 2)
    parts = [inner[round(i * size) : round((i + 1) * size)] for i in range(most - 2)]
    means = [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts if part]
    return [points[0], *means, points[-1]]


def smooth(points: Sequence[tuple[float, float]], reach: int) -> list[tuple[float, float]]:
    """Means over ``reach`` neighbours on either side, so that trends do not lag; over fewer near the ends."""
    smoothed = []
    for i, (x, _) in enumerate(points):
        near = max(reach // 2, min(reach, i, len(points) - 1 - i))
        window = points[max(0, i - near) : i + near + 1]
        smoothed.append((x, sum(y for _, y in window) / len(window)))
    return smoothed


def read_stage(directory: Path) -> StageHistory:
    """One stage's directory; without a metrics.jsonl it has no steps.

    Raises:
        HistoryError: One of its files cannot be read.
    """
    recipe_path, metrics_path = directory / RECIPE, directory / METRICS
    try:
        recipe = yaml.safe_load(recipe_path.read_text(encoding="utf-8")) if recipe_path.exists() else {}
        steps = tuple(read_metrics(metrics_path)) if metrics_path.exists() else ()
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise HistoryError(f"{directory}: {reason}. Is this a run's directory, and is it whole?") from error
    if not isinstance(recipe, dict):
        raise HistoryError(f"{recipe_path} is no recipe (a {type(recipe).__name__}): is {directory} a run's directory?")
    return StageHistory(directory.resolve().name, directory, redact(recipe), steps)
