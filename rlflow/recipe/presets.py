"""The algorithm table: a name is a row, a row is data. Functions are bound to the words in rlflow.algorithms.

Defaults are those of the paper that defines the name; every one can be overridden in the recipe. docs/algorithms.md
gives the equation of each row and where each default stands. Group sizes are the exception: papers use what their
machines hold (GRPO 64, DAPO 16, Dr. GRPO 8), the rows 8.
"""

from __future__ import annotations

from rlflow.recipe.rows import distillation, online, preferences, reward_models, sampling, sequences, supervised
from rlflow.recipe.rows.row import TASKS, AlgorithmRow, Learning, Task

__all__ = ["ALGORITHMS", "TASKS", "AlgorithmRow", "Learning", "Task"]

_ROWS = {
    **online.ROWS,
    **distillation.ROWS,
    **sampling.ROWS,
    **supervised.ROWS,
    **preferences.ROWS,
    **reward_models.ROWS,
    **sequences.ROWS,
}
ALGORITHMS: dict[str, AlgorithmRow] = {name: row for task in TASKS for name, row in _ROWS.items() if row.task == task}
"""Every row by its name, task by task."""
