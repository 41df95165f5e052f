"""Who is told what a run does: people on the console, metrics.jsonl, wandb."""

from __future__ import annotations

from pathlib import Path

from rlflow.recipe import Recipe
from rlflow.tracking.jsonl import JsonlTracker, read_metrics
from rlflow.tracking.tracker import MessageLog, StderrMessages, Tracker, Trackers

__all__ = ["Tracker", "make_tracker"]


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
    metrics_path = directory / "metrics.jsonl"

    def console() -> Tracker:
        from rlflow.tracking.console import ConsoleTracker

        earlier = read_metrics(metrics_path) if metrics_path.exists() else []
        title = recipe.stage or recipe.algorithm.name
        total = total_steps or recipe.run.steps or 0
        return ConsoleTracker(title, total, directory, resumed_at=resumed_at, earlier=earlier)

    def wandb() -> Tracker:
        from rlflow.tracking.wandb_tracker import WandbTracker

        return WandbTracker(recipe, directory, say=trackers.message)

    makers = {"console": console, "jsonl": lambda: JsonlTracker(metrics_path), "wandb": wandb}
    trackers.add(MessageLog(directory / "logs" / "run.log"))
    if "console" not in recipe.tracking:
        trackers.add(StderrMessages())
    for name in dict.fromkeys(recipe.tracking):
        trackers.add(makers[name]())
    return trackers
