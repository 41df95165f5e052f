"""Who is told what a run does: people on the console, metrics.jsonl, and the trackers that people have."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from rlflow.recipe import Recipe
from rlflow.tracking.jsonl import JsonlTracker, read_metrics
from rlflow.tracking.tracker import MessageLog, StderrMessages, Tracker, Trackers

__all__ = ["Tracker", "make_tracker", "missing_packages"]

IN_CHILDREN = ("wandb", "tensorboard", "trackio", "swanlab")
"""Trackers that are somebody else's library, each of the package of its name, in a process of its own."""


def make_tracker(recipe: Recipe, directory: Path, resumed_at: int = 0, *, total_steps: int | None = None) -> Tracker:
    """The trackers a stage's recipe names, as one.

    Args:
        recipe: The stage, resolved.
        directory: The stage's run directory; it exists.
        resumed_at: Step of the checkpoint the run goes on from, where the progress bar starts. ``metrics.jsonl``
            needs no telling: the first step that is logged replaces itself and everything after it.
        total_steps: Optimizer steps of the whole stage; ``run.steps`` when absent.
    """
    trackers = Trackers()
    metrics_path, logs = directory / "metrics.jsonl", directory / "logs"

    def console() -> Tracker:
        from rlflow.tracking.console import ConsoleTracker

        earlier = read_metrics(metrics_path) if metrics_path.exists() else []
        title = recipe.stage or recipe.algorithm.name
        total = total_steps or recipe.run.steps or 0
        return ConsoleTracker(title, total, directory, resumed_at=resumed_at, earlier=earlier)

    def in_child(name: str) -> Tracker:
        from rlflow.tracking.child_tracker import ChildTracker
        from rlflow.tracking.experiment import arguments_of

        return ChildTracker(name, arguments_of(name, recipe, directory), logs / f"{name}.log", say=trackers.message)

    makers = {"console": console, "jsonl": lambda: JsonlTracker(metrics_path)}
    trackers.add(MessageLog(logs / "run.log"))
    if "console" not in recipe.tracking:
        trackers.add(StderrMessages())
    for name in dict.fromkeys(recipe.tracking):
        trackers.add(in_child(name) if name in IN_CHILDREN else makers[name]())
    return trackers


def missing_packages(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Of every tracker whose package is not installed here: its dotted key, and what to do."""
    for index, name in enumerate(recipe.tracking):
        if name in IN_CHILDREN and importlib.util.find_spec(name) is None:
            remedy = f"pip install {name} (or 'rlflow[{name}]'), or remove it from the list"
            yield f"tracking.{index}", f"{name} is not installed here: {remedy}"
