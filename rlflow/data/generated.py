"""Data that is made rather than read: each generator yields rows as a file would."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np

from rlflow.data.digits import check_digits, digits
from rlflow.data.environment_rows import reasoning_gym, verifiers
from rlflow.data.errors import DataError
from rlflow.data.sampler import permutation

MAX_DIGITS = 3
"""A million problems an operator; one more digit is a hundred million."""


def arithmetic(
    operators: str = "+",
    digits: int = 2,
    split: Literal["train", "heldout"] = "train",
    heldout_fraction: float = 0.1,
    rows: int | None = None,
    seed: int = 0,
    template: str = "{a}{op}{b}=",
) -> list[dict[str, str]]:
    """Every problem ``a op b`` of up to ``digits`` digits, as {prompt, response, solution}.

    A hash of the problem alone decides its split, so train and heldout never share one as long as both are asked for
    with the same ``heldout_fraction``; for + and * the two orders of a pair are one problem.

    Args:
        operators: any of ``+-*``, e.g. "+-".
        digits: of the largest number, 1 to 3.
        split: which part.
        heldout_fraction: share of the problems that is held out.
        rows: this many, drawn with ``seed``; all when absent.
        seed: of that draw.
        template: the prompt, with {a}, {b} and {op}, e.g. "What is {a} + {b}?".

    Raises:
        DataError: an argument is out of its range.
    """
    check_arithmetic(operators, digits, split, heldout_fraction, template=template)
    size = 10**digits
    a, b = (part.ravel() for part in np.divmod(np.arange(size * size), size))
    problems: list[tuple[int, str, int]] = []
    for op in dict.fromkeys(operators):
        low, high = (np.minimum(a, b), np.maximum(a, b)) if op in "+*" else (a, b)
        held_out = _uniform(low * 10**MAX_DIGITS + high, ord(op)) < heldout_fraction
        chosen = held_out if split == "heldout" else ~held_out
        problems += [(int(x), op, int(y)) for x, y in zip(a[chosen], b[chosen], strict=True)]
    if rows is not None:
        if rows > len(problems):
            raise DataError(f"arithmetic: rows is {rows}, but {split} has {len(problems)} problems.")
        problems = [problems[index] for index in sorted(permutation(len(problems), seed, "arithmetic")[:rows])]
    return [_arithmetic_row(x, op, y, template) for x, op, y in problems]


def _arithmetic_row(a: int, op: str, b: int, template: str) -> dict[str, str]:
    answer = str({"+": a + b, "-": a - b, "*": a * b}[op])
    return {"prompt": template.format(a=a, op=op, b=b), "response": answer, "solution": answer}


def check_arithmetic(
    operators: str, digits: int, split: str, heldout_fraction: float, *, template: str, **draw: int | None
) -> None:
    """Looks at the arguments alone; those of the draw are its own concern.

    Raises:
        DataError: one is out of its range.
    """
    if not operators or set(operators) - set("+-*"):
        raise DataError(f"arithmetic: operators is {operators!r}; it takes any of + - *.")
    if not 1 <= digits <= MAX_DIGITS:
        raise DataError(f"arithmetic: digits is {digits}; it goes from 1 to {MAX_DIGITS}.")
    if split not in ("train", "heldout"):
        raise DataError(f"arithmetic: split is {split!r}; it is train or heldout.")
    if not 0.0 < heldout_fraction < 1.0:
        raise DataError(f"arithmetic: heldout_fraction is {heldout_fraction}; it lies between 0 and 1.")
    fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    needed = {"a", "b"} | ({"op"} if len(set(operators)) > 1 else set())
    if not needed <= fields <= {"a", "b", "op"}:
        raise DataError(
            f"arithmetic: template is {template!r}; it needs {{a}} and {{b}}, and {{op}} when there are several."
        )


def _uniform(keys: np.ndarray, salt: int) -> np.ndarray:
    """A number in [0, 1) from each key, float64: splitmix64's finaliser (Steele et al. 2014)."""
    x = keys.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(salt)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).astype(np.float64) / 2.0**64


CHECKS: dict[str, Callable[..., None]] = {"arithmetic": check_arithmetic, "digits": check_digits}
"""What can be told of a generator's arguments before it runs."""
GENERATORS: dict[str, Callable[..., Iterable[dict[str, Any]]]] = {
    "arithmetic": arithmetic,
    "digits": digits,
    "reasoning_gym": reasoning_gym,
    "verifiers": verifiers,
}
