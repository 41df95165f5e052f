"""Is the last number the completion names the reference? For answers too short or too plain for math-verify."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(
    prompts: Sequence[Any],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    solution: Sequence[Any],
    **columns: Any,
) -> list[float | None]:
    """1 where the last number equals the reference's last, 0 elsewhere, None where the reference has none.

    A policy cannot earn it by repeating the problem, as it can where the answer is evaluated: ``5 + 1`` is not ``6``.

    Args:
        solution: References, e.g. GSM8K's ``... #### 1,234``.
    """
    scores: list[float | None] = []
    for completion, gold in zip(completions, solution, strict=True):
        expected, found = _last(str(gold)), _last(completion)
        scores.append(None if expected is None else float(found == expected))
    return scores


def _last(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None
