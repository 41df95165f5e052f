"""Which rollouts of a run are meant."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from rlflow.data.errors import DataError
from rlflow.data.kept_answers import said_in, says_something, trains_something
from rlflow.tracking.rollout_files import rollout_files
from rlflow.tracking.rollouts import RolloutFileError, RolloutRecord, read_rollouts


def find_stage(run: Path) -> Path:
    """The directory whose rollouts are meant: a stage's own, or of a run with several the one that wrote some last.

    Raises:
        DataError: There is no such directory, or none with rollouts.
    """
    if not run.is_dir():
        raise DataError(f"{run}: there is no such directory; give the one that the recipe's run.output_dir names")
    having = {path: files for path in (run, *_directories(run)) if (files := rollout_files(path))}
    if not having:
        raise DataError(
            f"{run} has no rollouts, here or one directory below. Stages that generate nothing (SFT, DPO) have none; "
            "others keep those of every run.log_rollouts_every-th step"
        )
    return max(having, key=lambda path: max(file.stat().st_mtime for file in having[path].values()))


def steps_asked_for(known: Sequence[int], step: int | None, span: str | None) -> list[int]:
    """The steps that are meant: one, a span ``a:b`` with both ends, or the newest.

    Args:
        known: Those that have rollouts, in order; at least one.

    Raises:
        DataError: None of them is meant, or the span is no span.
    """
    if step is not None and span is not None:
        raise DataError("give --step or --steps, not both")
    if step is None and span is None:
        return [known[-1]]
    if span is not None:
        ends = re.fullmatch(r"(\d*):(\d*)", span)
        if ends is None:
            raise DataError(f"--steps {span}: write it as 100:200, :200 or 100:")
        low, high = int(ends[1] or known[0]), int(ends[2] or known[-1])
        meant = [one for one in known if low <= one <= high]
    else:
        meant = [one for one in known if one == step]
    if not meant:
        near = sorted(known, key=lambda one: abs(one - (low if span is not None else step or 0)))[:3]
        asked = f"step {step}" if span is None else f"any step of {span}"
        raise DataError(
            f"there are no rollouts of {asked}; {len(known)} steps from {known[0]} to {known[-1]} have some, the "
            f"nearest {', '.join(map(str, sorted(near)))}"
        )
    return meant


def load_records(
    stage: Path,
    steps: Sequence[int],
    *,
    tokens: bool,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[RolloutRecord]:
    """The rollouts of some steps, in order. ``tell`` is called with how many steps were read, and of how many.

    Raises:
        DataError: A file cannot be read.
    """
    files = rollout_files(stage)
    records: list[RolloutRecord] = []
    try:
        for done, step in enumerate(steps, start=1):
            records += read_rollouts(files[step], tokens=tokens, images=True)
            tell(done, len(steps))
        return records
    except RolloutFileError as error:
        raise DataError(str(error)) from error


def distinct(records: Sequence[RolloutRecord]) -> list[RolloutRecord]:
    """The rollouts that SFT can learn from, each answer to a prompt once: those in which the policy says something in
    every turn, one of which at least was not cut."""
    kept: dict[tuple[str, str], RolloutRecord] = {}
    for record in records:
        if says_something(record) and trains_something(record):
            kept.setdefault((json.dumps(record.messages), said_in(record)), record)
    return list(kept.values())


def few_a_prompt(records: Sequence[RolloutRecord], most: int) -> list[RolloutRecord]:
    """The first ``most`` of each prompt, in their order."""
    seen: Counter[str] = Counter()
    kept = []
    for record in records:
        seen[record.prompt_id] += 1
        if seen[record.prompt_id] <= most:
            kept.append(record)
    return kept


def _directories(run: Path) -> list[Path]:
    return sorted(path for path in run.iterdir() if path.is_dir())
