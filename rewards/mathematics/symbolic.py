"""math-verify's verdict on two isolated answers, for what `rlflow.rewards.mathematics.readings` cannot read."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException

from rlflow.rewards.mathematics.formulas import MAX_DIGITS

Parsed = tuple[Any, ...]


def verdict(answer: str, reference: str, timeout_s: int) -> bool:
    """Compares two answers, each in LaTeX without delimiters. Needs the main thread: time is kept with SIGALRM.

    Raises:
        TimeoutError: No verdict in that time.
    """
    answers = [expression for expression in parsed(answer, timeout_s) if not is_enormous(expression)]
    references = list(parsed(reference, timeout_s))
    try:
        return bool(answers and references) and verify(
            references, answers, timeout_seconds=timeout_s, raise_on_error=True
        )
    except TimeoutException as error:
        raise TimeoutError(f"comparing the answer {answer[:80]!r} took over {timeout_s} s") from error
    except (TypeError, ArithmeticError, AttributeError, NotImplementedError):
        return False  # sympy has no verdict on this pair


@lru_cache(maxsize=4096)
def parsed(answer: str, timeout_s: int) -> Parsed:
    """Returns sympy's expression of an answer in LaTeX; nothing where it is none.

    Raises:
        TimeoutError: Not in that time.
    """
    try:
        inside = answer.replace("$", " ")  # so that none of it stands outside the delimiters
        found = parse(f"${inside}$", [LatexExtractionConfig()], parsing_timeout=timeout_s, raise_on_error=True)
    except TimeoutException as error:
        raise TimeoutError(f"parsing the answer {answer[:80]!r} took over {timeout_s} s") from error
    return tuple(expression for expression in found if isinstance(expression, sympy.Basic | sympy.MatrixBase))


def is_enormous(expression: Any) -> bool:
    """Tells ``9**9**9`` and ``(10**8)!`` from numbers that can be computed, without computing them."""
    return isinstance(expression, sympy.Basic) and _digits(expression) > MAX_DIGITS


def _digits(node: Any) -> float:
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
