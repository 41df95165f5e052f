"""Is the last number the completion names the reference? For answers too short or too plain for mathematics."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from rlflow.rewards.ground_truth import ground_truth

NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]])[-\u2212])?[$€£¥]?(?<![\d.])"
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+(?!\d))?(?P<decimals>\.\d+|(?<=\d))"
    r"(?P<exponent>[eE][-+]?\d{1,4}(?![\w.]))?(?:/(?P<below>\d+)(?![\d.]))?"
)
MAX_DIGITS = 4000


def last_number(
    prompts: Sequence[Any],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    solution: Sequence[Any],
    **columns: Any,
) -> list[float | None]:
    """1 where the last number equals the reference's last, 0 elsewhere, None where the reference has none.

    A policy cannot earn it by repeating the problem, as it can where the answer is evaluated: ``5 + 1`` is not ``6``.
    A number may have thousands separators, decimals (``.5``), an exponent (``2e5``) and a denominator (``3/4``); a
    minus behind a digit or a letter is no sign (``9-5`` ends in 5).

    Args:
        solution: References, e.g. GSM8K's ``... #### 1,234``, or a mapping with a ``ground_truth``.
    """
    scores: list[float | None] = []
    for completion, gold in zip(completions, solution, strict=True):
        expected = last_value(str(ground_truth(gold)))
        scores.append(None if expected is None else float(last_value(completion) == expected))
    return scores


def last_value(text: str) -> Fraction | None:
    """Returns the last number of a text, exactly; None where it has none or one of more digits than can be written."""
    last = None
    for last in NUMBER.finditer(text):  # noqa: B007
        pass
    if last is None or len(last[0]) > MAX_DIGITS:
        return None
    digits = f"{(last['whole'] or '0').replace(',', '')}{last['decimals'] or ''}{last['exponent'] or ''}"
    value = Fraction(digits) / Fraction(int(last["below"]) if last["below"] and int(last["below"]) else 1)
    return -value if last["sign"] else value
