"""The value of a formula: exact where it is rational, to 50 digits elsewhere.

Two formulas are equal where their values agree at points that no identity singles out (Schwartz, 1980; Zippel, 1979).
Nothing here takes longer than a few milliseconds: what would write down more than `MAX_DIGITS` digits is refused,
unevaluated.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from mpmath.ctx_mp import MPContext

from rlflow.rewards.mathematics.formulas import MAX_DIGITS, TooLarge, Tree

mp = MPContext()
mp.dps = 50
SAME = mp.mpf(10) ** -30
"""Relative difference of two values, to 50 digits, that are one."""

MAX_BITS = 4 * MAX_DIGITS
"""Of what is added and multiplied, somewhat more than `MAX_DIGITS`."""

Value = Any
"""A Fraction, or one of mpmath's real or complex numbers."""


def value_at(tree: Tree, point: Mapping[str, Fraction]) -> Value:
    """Evaluates a formula.

    Args:
        point: A value for each of its variables.

    Raises:
        TooLarge: Its value, or that of a part, is beyond `MAX_DIGITS`.
        ArithmeticError, ValueError: It has none: a division by zero, the tangent of a right angle.
    """
    operation = tree[0]
    if operation in ("number", "value"):
        return tree[1]
    if operation == "name":
        return point[tree[1]]
    if operation in CONSTANTS:
        return CONSTANTS[operation]()
    result = OPERATIONS[operation](*(value_at(part, point) for part in tree[1:]))
    if not isinstance(result, Fraction) and not mp.isfinite(result):
        raise ZeroDivisionError(operation)
    return result


def real(value: Value) -> Any:
    """Returns a value as mpmath's number."""
    return mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def are_same(first: Value, second: Value) -> bool:
    """Whether two values are one: exactly where both are rational, to 30 digits elsewhere."""
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return first == second
    first, second = real(first), real(second)
    return bool(abs(first - second) <= SAME * max(abs(first), abs(second), mp.mpf(10) ** -25))


def sample_points(
    variables: frozenset[str], count: int, *, signed: bool = False, whole: bool = False
) -> list[dict[str, Fraction]]:
    """Returns points for some variables, the same in every process: fractions between 1 and 3, or whole numbers from 2
    to 40; where they are to be signed of both signs, and half of them up to 300."""
    points = []
    for number in range(count):
        hashes = [zlib.crc32(f"{name}/{number}".encode()) for name in sorted(variables)]
        signs = [-1 if signed and (number + index) % 2 else 1 for index in range(len(hashes))]
        values = [Fraction(2 + hashed % 39) if whole else Fraction(5003 + hashed % 9973, 5009) for hashed in hashes]
        scale = 100 if signed and number % 4 > 1 else 1
        points.append(
            {name: scale * sign * value for name, sign, value in zip(sorted(variables), signs, values, strict=True)}
        )
    return points


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if base in (0, 1, -1) or abs(exponent.numerator) * _bits(base) <= MAX_BITS:
            return base ** int(exponent)
        if base.denominator == 1:
            raise TooLarge
    first, second = real(base), real(exponent)
    if first != 0 and abs(second) * (abs(mp.log(abs(first))) + 4) > 3 * MAX_DIGITS:
        raise TooLarge
    return mp.power(first, second)


def _root(radicand: Value, degree: Value) -> Value:
    if isinstance(radicand, Fraction) and isinstance(degree, Fraction) and degree.denominator == 1:
        number = int(degree)
        if radicand < 0 and number % 2:
            return -_root(-radicand, degree)
        if radicand >= 0 and 0 < number < 100:
            parts = [_integer_root(part, number) for part in (radicand.numerator, radicand.denominator)]
            if None not in parts:
                return Fraction(parts[0] or 0, parts[1] or 1)
    return _power(real(radicand), 1 / real(degree))


def _integer_root(number: int, degree: int) -> int | None:
    if number.bit_length() > 3000:
        return None
    guess = math.isqrt(number) if degree == 2 else int(mp.nint(mp.root(number, degree)))
    return guess if guess**degree == number else None


def _factorial(value: Value) -> Value:
    if not isinstance(value, Fraction) or value.denominator != 1 or value < 0:
        raise ValueError("a factorial of what is no whole number")
    if value > 1700:
        raise TooLarge
    return Fraction(math.factorial(int(value)))


def _binomial(above: Value, below: Value) -> Value:
    if not all(isinstance(part, Fraction) and part.denominator == 1 and part >= 0 for part in (above, below)):
        raise ValueError("a binomial of what are no whole numbers")
    if min(below, above - below) * max(1, math.log10(above + 1)) > MAX_DIGITS:
        raise TooLarge
    return Fraction(math.comb(int(above), int(below)))


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _exactly(operation: Callable[[Any, Any], Any]) -> Callable[[Value, Value], Value]:
    def apply(first: Value, second: Value) -> Value:
        if isinstance(first, Fraction) and isinstance(second, Fraction):
            if max(map(_bits, (first, second))) > MAX_BITS:
                raise TooLarge
            return operation(first, second)
        return operation(real(first), real(second))

    return apply


def _rounded(function: Callable[[Any], int]) -> Callable[[Value], Value]:
    def apply(value: Value) -> Value:
        if isinstance(value, mp.mpc):
            raise ValueError("a complex number is not rounded")
        return Fraction(function(value))

    return apply


def _analytic(name: str) -> Callable[[Value], Value]:
    function = getattr(mp, name)
    return lambda value: function(real(value))


CONSTANTS: Mapping[str, Callable[[], Value]] = {
    "pi": lambda: +mp.pi,
    "e": lambda: +mp.e,
    "i": lambda: mp.mpc(0, 1),
    "degree": lambda: mp.pi / 180,
    "infty": lambda: _no_number(),
}
OPERATIONS: Mapping[str, Callable[..., Value]] = {
    "+": _exactly(lambda a, b: a + b),
    "-": _exactly(lambda a, b: a - b),
    "*": _exactly(lambda a, b: a * b),
    "/": _exactly(lambda a, b: a / b),
    "negative": lambda a: -a,
    "^": _power,
    "root": _root,
    "!": _factorial,
    "binomial": _binomial,
    "abs": abs,
    "floor": _rounded(math.floor),
    "ceiling": _rounded(math.ceil),
    "exp": lambda a: _power(+mp.e, a),
    "log": lambda a: mp.log(real(a), 10),
    "lg": lambda a: mp.log(real(a), 10),
    "log_of_base": lambda a, b: mp.log(real(a), real(b)),
    "arcsin": _analytic("asin"),
    "arccos": _analytic("acos"),
    "arctan": _analytic("atan"),
    **{
        name: _analytic(name)
        for name in (["sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh", "ln"])
    },
}


def _no_number() -> Value:
    raise ValueError("infinity is no number to compute with")
