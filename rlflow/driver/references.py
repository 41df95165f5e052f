"""References of the data that no reward can use, found before Ray starts.

Most are read here, some ten thousand a second; formulas that only math-verify can parse go to one child process, which
is killed at a deadline. What is not decided by then is taken as good.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlflow.actors.reward_process import child_environment
from rlflow.data.errors import BadRow, DataError
from rlflow.data.records import refuse_bad_rows
from rlflow.data.sources import Table, read_table
from rlflow.recipe import Recipe, RewardBlock, SourceBlock
from rlflow.rewards.references import REFERENCE_CHECKS, Formula, reference_problem

MAX_FORMULAS = 1000
DEADLINE_S = 30.0

_parsed: dict[str, bool] = {}
"""Of every formula that was decided, whether it can be parsed."""

Reject = Callable[[Mapping[str, Any]], str | None]
"""The columns of a row -> why the row cannot be used."""


def check_sources(recipe: Recipe) -> None:
    """Reads every source of a recipe, and the references of all rows that are rewarded.

    Raises:
        DataError: A source cannot be read; or more rows than its ``max_bad_rows`` have a reference that cannot be used,
            or none has one.
    """
    training = recipe.data.train if isinstance(recipe.data.train, list) else [recipe.data.train]
    for source in training:
        _check(source, recipe.rewards if recipe.generates else [])
    shown = [] if recipe.demonstrations is None else recipe.demonstrations.train
    for source in shown if isinstance(shown, list) else [shown]:
        _check(source, [])
    for block in recipe.evaluations.values():
        reward = recipe.reward_of(block)
        _check(block.data, [reward] if reward is not None else [])


def _check(source: SourceBlock, rewards: Sequence[RewardBlock]) -> None:
    table = read_table(source)
    if names := _checked(rewards):
        _need_column(table, names)
        _parse_formulas(row.columns.get("solution") for row in table.rows)
        reject = reject_references(rewards)
        problems = ((row.number, reject(row.columns)) for row in table.rows)
        bad = [BadRow(table.place, number, problem) for number, problem in problems if problem]
        refuse_bad_rows(table.place, [*table.bad, *bad], source.max_bad_rows)


def reject_references(rewards: Sequence[RewardBlock]) -> Reject:
    """Returns what says why a row's reference cannot be used by one of the rewards."""
    names = _checked(rewards)

    def reject(columns: Mapping[str, Any]) -> str | None:
        reference = columns.get("solution")
        for name in names:
            problem = reference_problem(name, reference)
            if isinstance(problem, Formula):
                problem = None if _parsed.get(problem.text, True) else "cannot be parsed as mathematics"
            if problem is not None:
                shown = repr(reference)
                shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
                return f"{name} cannot use the reference {shown}: it {problem}"
        return None

    return reject


def _checked(rewards: Sequence[RewardBlock]) -> list[str]:
    return list(
        dict.fromkeys(block.name for block in rewards if block.name is not None and block.name in REFERENCE_CHECKS)
    )


def _need_column(table: Table, names: Sequence[str]) -> None:
    if table.rows and not any("solution" in row.columns for row in table.rows):
        columns = ", ".join(dict.fromkeys(name for row in table.rows[:100] for name in row.columns))
        raise DataError(
            f"{table.place}: {names[0]} needs a column `solution`, and the rows have {columns}. Name the column that "
            "holds the answers in this source's `columns`, e.g. columns: {solution: answer}."
        )


def _parse_formulas(references: Iterable[Any]) -> None:
    """Asks math-verify about the formulas that nothing is known of yet."""
    problems = (reference_problem("math_accuracy", reference) for reference in references)
    formulas = dict.fromkeys(problem.text for problem in problems if isinstance(problem, Formula))
    unknown = [formula for formula in formulas if formula not in _parsed][:MAX_FORMULAS]
    if unknown:
        _parsed.update(zip(unknown, _ask_child(unknown, DEADLINE_S), strict=False))


def _ask_child(formulas: Sequence[str], deadline_s: float) -> list[bool]:
    """Returns, for as many of the formulas as were decided in time, whether each can be parsed."""
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "rlflow.rewards.reference_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=child_environment(os.environ),
    )
    try:
        said, _ = child.communicate(json.dumps(formulas).encode(), timeout=deadline_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        said, _ = child.communicate(timeout=10)
    except BaseException:
        child.kill()
        raise
    return [line == b"1" for line in said.split(b"\n") if line in (b"0", b"1")]
