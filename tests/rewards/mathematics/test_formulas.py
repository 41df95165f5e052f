"""Formulas have the values that sympy gives them, or that are known; what is no formula is refused."""

from __future__ import annotations

from fractions import Fraction

import pytest
import sympy

from rlflow.rewards.mathematics.formulas import TooLarge, Unreadable, names, parse_formula
from rlflow.rewards.mathematics.values import are_same, real, value_at


@pytest.mark.parametrize(
    "text",
    [
        "3 + 4*2 - 6/3",
        "2^3^2",
        "-2^2",
        "(1 + sqrt(5))/2",
        "sqrt(8) - 2*sqrt(2)",
        "sin(pi/6) + cos(1)*tan(2)",
        "exp(2)*ln(3)",
        "5!/3!",
        "2^(-3)",
        "abs(-7/3)",
        "(2 + 3*i)^3/(1 - i)",
        "asin(1/2) + atan(2)",
        "(-8)^(1/3)",
        "1.5e3 + .25",
    ],
)
def test_a_typed_formula_has_sympys_value(text: str) -> None:
    expected = sympy.N(sympy.sympify(text.replace("^", "**").replace("i)", "I)").replace("*i", "*I")), 30)
    value = real(value_at(parse_formula(text), {}))
    assert complex(value) == pytest.approx(complex(expected), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\frac12", Fraction(1, 2)),
        (r"\dfrac{3}{4}", Fraction(3, 4)),
        (r"2\frac{3}{4}", Fraction(11, 4)),
        (r"\frac{2}{3}{4}", Fraction(8, 3)),
        (r"\sqrt[3]{27}", Fraction(3)),
        (r"\sqrt{\frac{9}{16}}", Fraction(3, 4)),
        (r"\binom{5}{2}", Fraction(10)),
        (r"\lfloor -1.5 \rfloor", Fraction(-2)),
        (r"\lceil 1.2 \rceil + |-3|", Fraction(5)),
        (r"2 \cdot 3 \times 4 \div 8", Fraction(3)),
        ("25%", Fraction(1, 4)),
        ("10^-3", Fraction(1, 1000)),
    ],
)
def test_latex_has_exact_values(text: str, value: Fraction) -> None:
    assert value_at(parse_formula(text), {}) == value


@pytest.mark.parametrize(
    ("text", "other"),
    [
        (r"\sin 30°", r"\frac12"),
        (r"\sin^2 40° + \cos^2 40°", "1"),
        (r"\sin^{-1} 1", r"\frac{\pi}{2}"),
        (r"\log_2 32", "5"),
        (r"\log 1000", "3"),
        (r"e^{i\pi}", "-1"),
        (r"\cos 2\pi", "1"),
        ("2pi", r"2\pi"),
    ],
)
def test_functions_take_degrees_bases_powers_and_products(text: str, other: str) -> None:
    assert are_same(value_at(parse_formula(text), {}), value_at(parse_formula(other), {}))


def test_letters_side_by_side_are_factors_and_indices_belong_to_their_letter() -> None:
    assert names(parse_formula("4uv + x_1 x_{12}")) == {"u", "v", "x_1", "x_12"}
    assert value_at(parse_formula("4uv"), {"u": Fraction(2), "v": Fraction(3)}) == 24
    assert value_at(parse_formula("x(x+1)"), {"x": Fraction(2)}) == 6


@pytest.mark.parametrize(
    "text", ["2 5", "3 +", "(1", r"\frac{1}{", "", ")", "1)", r"\foo", "2^", "(" * 50 + "1" + ")" * 50]
)
def test_what_is_no_formula_is_refused(text: str) -> None:
    with pytest.raises(Unreadable):
        parse_formula(text)


@pytest.mark.parametrize("text", ["9^9^9", "(10^8)!", r"\binom{10^9}{10^8}", "1e9999", "2.5^{9^9}", "10^{-10^{10}}"])
def test_what_nobody_can_write_down_is_not_computed(text: str) -> None:
    with pytest.raises(TooLarge):
        value_at(parse_formula(text), {})


@pytest.mark.parametrize(
    ("text", "is_too_large"),
    [
        (r"\binom{2000}{1000}", False),
        (r"\binom{5000}{2000}", True),
        (r"\binom{20000}{2}", False),
        ("3^(-5000) * 3^(-5000) * 3^(-5000) * 3^(-5000)", True),
        ("3^(-1000) * 3^(-1000)", False),
    ],
)
def test_what_is_too_large_to_write_down_is_not_computed(text: str, is_too_large: bool) -> None:
    tree = parse_formula(text)
    if is_too_large:
        with pytest.raises(TooLarge):
            value_at(tree, {})
    else:
        assert value_at(tree, {}) != 0
