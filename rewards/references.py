"""References that a reward can never use, told apart from those it can before a run starts with them.

Nothing here imports sympy. What only math-verify can tell is returned as a `Formula`, for a process that can be killed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rlflow.rewards.answers import reference_answer
from rlflow.rewards.ground_truth import ground_truth
from rlflow.rewards.last_number import last_value
from rlflow.rewards.mathematics.equality import holds_unknown
from rlflow.rewards.mathematics.reader import MAX_ANSWER_CHARACTERS, read
from rlflow.rewards.mathematics.readings import Nothing, Words


@dataclass(frozen=True, slots=True)
class Formula:
    """An answer in LaTeX that only math-verify may be able to read."""

    text: str


def reference_problem(reward: str, reference: Any) -> str | Formula | None:
    """Says what keeps a reward of ours from ever using a reference.

    Args:
        reward: A name of `REFERENCE_CHECKS`.
        reference: A value of the column ``solution``. None and an empty text are no reference: the reward abstains.

    Returns:
        The problem, as the rest of a sentence; a formula that is still to be parsed; None where there is none.
    """
    if isinstance(reference, Mapping) and reference.get("ground_truth") is None:
        return f"is an object without `ground_truth` (it has {', '.join(map(str, reference)) or 'nothing'})"
    truth = ground_truth(reference)
    if truth is None or (isinstance(truth, str) and not truth.strip()):
        return None
    if isinstance(truth, list | tuple):
        return f"is a list of {len(truth)}, not one answer"
    if isinstance(truth, float) and not math.isfinite(truth):
        return "is no finite number"
    return REFERENCE_CHECKS[reward](str(truth))


@lru_cache(maxsize=4096)
def _answer_problem(text: str) -> str | Formula | None:
    answer = reference_answer(text)
    if answer is None:
        return "states no answer"
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return f"has an answer of {len(answer):,} characters, and {MAX_ANSWER_CHARACTERS} are the most"
    reading = read(answer)
    if isinstance(reading, Nothing):
        return "has no value: a division by zero, sides that differ, or a number too large to be written down"
    if isinstance(reading, Words) and not re.search(r"[^\W_]", reading.text):
        return "holds no letter and no digit"
    return Formula(answer) if holds_unknown(reading) else None


def _number_problem(text: str) -> str | None:
    return None if last_value(text) is not None else "names no number"


REFERENCE_CHECKS: Mapping[str, Callable[[str], str | Formula | None]] = {
    "math_accuracy": _answer_problem,
    "cosine": _answer_problem,
    "last_number": _number_problem,
    "exact_match": lambda text: None,
}
"""The rewards that read the column ``solution``, and what each asks of a reference's text."""
