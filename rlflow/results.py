"""What a run left, for programs: numbers, rollouts, where its models are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlflow.data.errors import DataError
from rlflow.tracking.history import HistoryError, read_stage, read_stages
from rlflow.tracking.rollouts import RolloutRecord, read_rollouts, rollouts_path


@dataclass(frozen=True)
class Result:
    """What a run, or one stage of it, left in its directory. Of a run with several stages it is what the last one left,
    and ``stages`` has each."""

    directory: Path
    """The stage's, with metrics.jsonl, rollouts/, checkpoints/, final/ and report.html; of a run with several stages
    the one that holds theirs."""
    metrics: Mapping[str, float] = field(repr=False)
    """The last step's, the evaluation's among them (``eval/heldout/pass@1``); NaN where a value was not finite. Empty
    where ``tracking`` had no jsonl."""
    final: Path | None
    """The trained model as a Hugging Face directory, or its adapter; None while there is none."""
    best: Path | None
    """The checkpoint of the best evaluation; None without an evaluation."""
    recipe: Mapping[str, Any] = field(repr=False)
    """The resolved recipe, without its secrets."""
    steps: Sequence[Mapping[str, float]] = field(repr=False)
    """The metrics of each step, ``step`` and ``time`` among them; step 0 is what was measured before the first."""
    stages: Mapping[str, Result] = field(default_factory=dict)
    """By name, in order; empty for a run without stages."""

    def series(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of every step that has the metric, where it is finite.

        Raises:
            KeyError: No step has it.
        """
        points = [(int(row["step"]), row[metric]) for row in self.steps if metric in row]
        if not points:
            known = dict.fromkeys(key for row in self.steps for key in row)
            raise KeyError(f"no step has {metric}; there are {', '.join(known) or 'none'}")
        return [(step, value) for step, value in points if math.isfinite(value)]

    def rollouts(self, step: int) -> list[RolloutRecord]:
        """What was generated for a step, in the order in which it was trained.

        Raises:
            DataError: The step kept none.
        """
        last = self if not self.stages else list(self.stages.values())[-1]
        path = rollouts_path(last.directory, step)
        if not path.is_file():
            raise DataError(f"there is no {path}: the stage does not generate, or run.log_rollouts_every left it out")
        return read_rollouts(path, images=True)


def read_result(directory: str | Path) -> Result:
    """What a run has left so far, whoever started it, finished or not.

    Raises:
        DataError: It is no run's directory.
    """
    directory = Path(directory)
    try:
        stages = [stage.directory for stage in read_stages(directory)]
    except HistoryError as error:
        raise DataError(str(error)) from error
    return result_of(directory, stages)


def result_of(directory: Path, stages: Sequence[Path]) -> Result:
    """Of a run whose stages have these directories: one alone may be the run's own."""
    if list(stages) == [directory]:
        return _of_stage(directory)
    of_stages = {path.name: _of_stage(path) for path in stages}
    last = list(of_stages.values())[-1]
    return Result(directory, last.metrics, last.final, last.best, last.recipe, last.steps, of_stages)


def _of_stage(directory: Path) -> Result:
    history = read_stage(directory)
    own = {key: value for key, value in (history.steps or ({},))[-1].items() if key not in ("step", "time")}
    final, best = directory / "final", directory / "checkpoints" / "best"
    return Result(
        directory,
        own,
        final if final.is_dir() else None,
        best.resolve() if best.exists() else None,
        history.recipe,
        history.steps,
    )
