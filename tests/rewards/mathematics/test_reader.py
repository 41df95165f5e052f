"""The reading of single answers, by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest

from rlflow.rewards.mathematics.reader import read
from rlflow.rewards.mathematics.readings import Collection, Number, Reading, Words

FIVE, SIX = Number(Fraction(5)), Number(Fraction(6))


@pytest.mark.parametrize(
    ("answer", "reading"),
    [
        (r"\{5\}", Collection("{}", (FIVE,))),
        (r"\{5, 6\}", Collection("{}", (FIVE, SIX))),
        ("(5, 6]", Collection("(]", (FIVE, SIX))),
        ("5, 6", Collection("", (FIVE, SIX))),
        (r"x \ge 5", Collection("[)", (FIVE, Words("infinity")))),
        (r"(5, 6) \cup \{5\}", Collection("union", (Collection("()", (FIVE, SIX)), Collection("{}", (FIVE,))))),
    ],
)
def test_brackets_say_what_a_collection_is(answer: str, reading: Reading) -> None:
    assert read(answer) == reading


@pytest.mark.parametrize(
    ("answer", "value", "last_place", "unit"),
    [
        (".25 cm", Fraction(1, 4), Fraction(1, 100), "cm"),
        ("0.5 cm", Fraction(1, 2), Fraction(1, 10), "cm"),
        ("2.50e3 cm", Fraction(2500), Fraction(10), "cm"),
        ("1.5 million", Fraction(1_500_000), Fraction(100_000), ""),
        ("25 cm", Fraction(25), None, "cm"),
    ],
)
def test_a_decimal_may_be_rounded_in_its_last_digit(
    answer: str, value: Fraction, last_place: Fraction | None, unit: str
) -> None:
    reading = read(answer)
    assert isinstance(reading, Number)
    assert (reading.value, reading.last_place) == (value, last_place)
    assert reading.unit == unit or answer.endswith("million")
