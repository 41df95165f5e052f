"""Is the final answer mathematically equal to the reference? Verdicts by math-verify (sympy)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import sympy
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException

from rlflow.rewards.answers import final_answer

MAX_ANSWER_CHARACTERS = 400
MAX_NESTING = 40
MAX_DIGITS = 5000
"""An answer that is longer, deeper or, written out, has more digits than this is wrong without being computed."""

WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
PLAIN_FUNCTION = re.compile(r"(?<![\\A-Za-z])(pi|sin|cos|tan|cot|sec|csc|log|ln|infty|theta|alpha|beta)(?![A-Za-z])")
MIXED_NUMBER = re.compile(r"(?<![\d.,])(\d+)\s+(\d+)/(\d+)(?![\d.,])")

Parsed = tuple[Any, ...]


def math_accuracy(
    prompts: Sequence[Any],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    solution: Sequence[Any],
    *,
    explicit: bool = False,
    timeout_s: int = 2,
    **columns: Any,
) -> list[float | None]:
    r"""1 where the final answer equals the reference, 0 where it does not, None where the reference is no mathematics.

    What counts as a final answer is in `rlflow.rewards.answers.final_answer`. Must run on the main thread of its
    process: math-verify keeps its time with SIGALRM.

    Args:
        solution: References: a bare answer (``\frac{1}{3}``, ``1,234``), or a worked solution that ends in
            ``#### 42`` or ``\boxed{42}``.
        explicit: Accept only a stated answer, never the last number of the completion.
        timeout_s: Whole seconds that parsing or comparing one answer may take.

    Raises:
        TimeoutError: No verdict in that time. It is an error and not a 0: the answer may be right.
    """
    rewards: list[float | None] = []
    for completion, gold in zip(completions, solution, strict=True):
        reference = None if gold is None else final_answer(str(gold))
        golds = _parse(reference, timeout_s) if reference else ()
        if reference is None or not golds:
            rewards.append(None)
            continue
        answer = final_answer(completion, explicit=explicit)
        rewards.append(0.0 if answer is None else float(_is_equal(answer, reference, golds, timeout_s)))
    return rewards


def _is_equal(answer: str, reference: str, golds: Parsed, timeout_s: int) -> bool:
    if _without_spaces(answer) == _without_spaces(reference):
        return True
    if len(answer) > MAX_ANSWER_CHARACTERS or _nesting(answer) > MAX_NESTING:
        return False
    answers = [expression for expression in _parse(answer, timeout_s) if not _is_enormous(expression)]
    try:
        return verify(list(golds), answers, timeout_seconds=timeout_s, raise_on_error=True)
    except TimeoutException as error:
        raise TimeoutError(f"comparing the answer {answer[:80]!r} took over {timeout_s} s") from error


@lru_cache(maxsize=4096)
def _parse(answer: str, timeout_s: int) -> Parsed:
    """Returns the readings of an answer: as LaTeX, and where it has words also the first number or formula in them."""
    text = MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", PLAIN_FUNCTION.sub(r"\\\1 ", answer))
    readings = [(f"${text}$", LatexExtractionConfig())]
    if WORD.search(text) or "$" in answer:
        readings += [(f"Answer: {answer}", LatexExtractionConfig()), (f"Answer: {answer}", ExprExtractionConfig())]
    expressions: list[Any] = []
    for reading, config in readings:
        try:
            expressions += parse(reading, [config], parsing_timeout=timeout_s, raise_on_error=True)
        except TimeoutException as error:
            raise TimeoutError(f"parsing the answer {answer[:80]!r} took over {timeout_s} s") from error
    return tuple(e for e in expressions if isinstance(e, sympy.Basic | sympy.MatrixBase))


def _without_spaces(answer: str) -> str:
    return re.sub(r"\s+", "", answer)


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    return deepest


def _is_enormous(expression: Any) -> bool:
    """Tells ``9**9**9`` and ``(10**8)!`` from numbers that can be computed, without computing them."""
    return isinstance(expression, sympy.Basic) and _digits(expression) > MAX_DIGITS


def _digits(node: sympy.Basic) -> float:
    """Upper estimate of the decimal digits that evaluating the expression, or any part of it, writes down."""
    parts = [_digits(argument) for argument in node.args]
    largest = max(parts, default=0.0)
    if isinstance(node, sympy.Rational):
        return math.log10(max(abs(node.p), node.q, 1)) if max(abs(node.p), node.q) < 10**300 else 300.0
    if isinstance(node, sympy.Pow):
        return max(largest, max(parts[0], 1.0) * _power_of_ten(parts[1]))
    if isinstance(node, sympy.factorial | sympy.binomial):
        return max(largest, parts[0] * _power_of_ten(parts[0]))
    return sum(parts) if isinstance(node, sympy.Mul) else largest


def _power_of_ten(digits: float) -> float:
    return 10.0**digits if digits < 300 else math.inf
