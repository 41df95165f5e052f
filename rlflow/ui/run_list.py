"""A line for each run of a directory: how it stands, how far it is, when it will be done, how well it does.

Hundreds of runs are listed at once, so nothing here reads a whole file; a run that has not changed is not read again.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import yaml

from rlflow.checkpoint import saved_steps
from rlflow.driver.outcome import OUTCOME, Outcome, read_outcome
from rlflow.driver.run_lock import LOCK, Holder, holder_of
from rlflow.tracking.history import METRICS, RECIPE
from rlflow.tracking.lines import first_present
from rlflow.ui.run_rows import Row, number_in, sample_rows, tail_rows
from rlflow.ui.served import Served

State = Literal["starting", "running", "finished", "failed", "stopped"]

POINTS = 32
"""Of a sparkline."""
HEADLINES = (
    "reward/mean",
    "preference/accuracy",
    "kto/accuracy",
    "reward_model/accuracy",
    "loss/sft",
    "loss/reward_model",
    "loss/preference",
    "loss/total",
)
"""The first of these that a run has is what it is judged by at a glance."""
UNUSUAL = 10.0
"""A step that takes so many times as long as most had something else to do, such as loading a checkpoint."""
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class Progress:
    """What a run's files say, but for whether its process is alive."""

    step: int | None
    steps: int | None
    """Of the whole run, where its recipe counts steps."""
    seconds_a_step: float | None
    updated: float | None
    """When the newest line was written, in seconds since 1970."""
    headline: str | None
    values: tuple[float, ...]
    """Of the headline metric, spread over the run."""
    algorithm: str | None
    model: str | None
    outcome: Outcome | None
    is_final: bool
    """Whether it has left its final model."""
    saved: int | None
    """The newest checkpoint's step."""


class RunList:
    """The runs of a directory; remembers what it read of each."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._read: dict[str, tuple[Any, Progress]] = {}

    def cards(self) -> list[dict[str, Any]]:
        """A mapping for each run, those at work first, then the newest."""
        names = self._served.run_names()
        cards = [self.card(name) for name in names]
        self._read = {name: self._read[name] for name in names}
        order = {"running": 0, "starting": 0}
        return sorted(cards, key=lambda card: (order.get(card["state"], 1), -(card["updated"] or 0), card["run"]))

    def card(self, name: str) -> dict[str, Any]:
        """What is shown of one run."""
        directory = self._served.root / name
        signature = _signature(directory)
        if name not in self._read or self._read[name][0] != signature:
            self._read[name] = signature, _read_progress(self._served, directory)
        progress = self._read[name][1]
        holder = holder_of(directory)
        state = state_of(directory, progress, holder)
        left = None if progress.steps is None or progress.step is None else max(0, progress.steps - progress.step)
        seconds = progress.seconds_a_step
        return {
            "run": name,
            "state": state,
            "message": progress.outcome.message if progress.outcome and state in ("failed", "stopped") else "",
            "step": progress.step,
            "steps": progress.steps,
            "eta_s": left * seconds if state == "running" and left is not None and seconds is not None else None,
            "updated": progress.updated,
            "headline": progress.headline,
            "values": progress.values,
            "algorithm": progress.algorithm,
            "model": progress.model,
            "can_stop": state in ("running", "starting") and (holder is None or holder.is_here),
            # Of another machine nobody knows whether its process lives: the run itself finds out.
            "can_resume": state in ("failed", "stopped", "finished") or not (holder is None or holder.is_here),
            "can_chat": progress.is_final or progress.saved is not None,
        }


def state_of(directory: Path, progress: Progress, holder: Holder | None) -> State:
    """How a run stands.

    A process that has the directory is at work on it, unless the stage has ended since that process took it: a run of
    several stages has all their directories to its end.
    """
    outcome = progress.outcome
    if holder is not None:
        if outcome is not None and _modified(directory / OUTCOME) > _modified(directory / LOCK):
            return outcome.ending
        if not holder.is_alive:
            return "finished" if outcome is not None and outcome.ending == "finished" else "failed"
        return "running" if progress.step is not None else "starting"
    if outcome is not None:
        return outcome.ending
    if progress.is_final:
        return "finished"
    # Runs of a version that kept no outcome: one that was asked to stop has saved its last step.
    return "stopped" if progress.saved is not None and progress.saved == progress.step else "failed"


def _read_progress(served: Served, directory: Path) -> Progress:
    recipe = _read_recipe(served, directory / RECIPE)
    metrics = directory / METRICS
    rows: list[Row] = []
    recent: list[Row] = []
    if metrics.is_file() and served.name_of(metrics) is not None:
        with contextlib.suppress(OSError):  # not ours to read, or just gone
            rows, recent = sample_rows(metrics, POINTS), tail_rows(metrics)
    headline = first_present({key: 0.0 for row in rows for key in row}, HEADLINES)
    values = [number_in(row, headline) for row in rows] if headline is not None else []
    last = recent[-1] if recent else None
    steps = _below(recipe, "run", "steps")
    model = _below(recipe, "model", "path")
    saved = saved_steps(directory / "checkpoints")
    return Progress(
        step=None if last is None else int(last["step"]),
        steps=steps if isinstance(steps, int) else None,
        seconds_a_step=_seconds_a_step(recent),
        updated=number_in(last, "time") if last is not None else _modified(directory),
        headline=headline,
        values=tuple(value for value in values if value is not None),
        algorithm=_text(_below(recipe, "algorithm", "name")),
        model=_text(model) or ("a new model" if recipe else None),
        outcome=read_outcome(directory),
        is_final=(directory / "final").is_dir(),
        saved=saved[-1] if saved else None,
    )


def _seconds_a_step(rows: list[Row]) -> float | None:
    """How long a step takes now, with its share of evaluations and without starts, which a step after a pause has."""
    taken = [number_in(row, "time/step_s") for row in rows if row["step"] > 0]
    known = [seconds for seconds in taken if seconds is not None and seconds >= 0]
    if not known:
        return None
    usual = [seconds for seconds in known if seconds <= UNUSUAL * median(known)]
    return sum(usual) / len(usual)


def _read_recipe(served: Served, path: Path) -> dict[str, Any]:
    """The resolved recipe; empty where there is none that can be read."""
    try:
        if served.name_of(path) is None or path.stat().st_size > 1 << 20:
            return {}
        recipe = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _below(recipe: dict[str, Any], block: str, key: str) -> Any:
    inner = recipe.get(block)
    return inner.get(key) if isinstance(inner, dict) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _signature(directory: Path) -> tuple[Any, ...]:
    """What changes when a run has something new to say."""
    parts: list[Any] = []
    for name in (METRICS, RECIPE, OUTCOME, "final", "checkpoints"):
        try:
            found = (directory / name).stat()
            parts.append((found.st_ino, found.st_size, found.st_mtime_ns))
        except OSError:
            parts.append(None)
    return tuple(parts)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()
