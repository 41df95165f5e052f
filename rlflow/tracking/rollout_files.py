"""The names of a stage's rollout files: rollouts/step_000012.parquet."""

from __future__ import annotations

import re
from pathlib import Path


def rollout_files(directory: Path) -> dict[int, Path]:
    """The rollout files of a stage's directory by step, in order."""
    return dict(sorted((step_of(path), path) for path in (directory / "rollouts").glob("step_*.parquet")))


def step_of(path: Path) -> int:
    """The step in a rollout file's name; 0 where there is none."""
    found = re.fullmatch(r"step_(\d+)", path.stem)
    return int(found[1]) if found else 0
