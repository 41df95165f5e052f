"""Units of measure: several names are one unit, and two known ones must agree."""

from __future__ import annotations

import pytest

from rlflow.rewards.math_accuracy import math_accuracy
from rlflow.rewards.mathematics.units import differ, unit_of


def verdict(answer: str, reference: str) -> float | None:
    (reward,) = math_accuracy([None], [rf"\boxed{{{answer}}}"], [[]], [reference])
    return reward


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("5 cm²", "5 cm"),
        (r"5\text{ cm}^2", r"5\text{ cm}"),
        ("5 square cm", "5 cm"),
        ("5 cm squared", "5 cm"),
        ("5 sq ft", "5 ft"),
        ("5 cubic feet", "5 square feet"),
        ("18 square feet", "18 square inches"),
        ("5 mph", "5 mi"),
        ("5 miles per hour", "5 miles"),
        ("60 km/h", "60 mph"),
        ("5 km/h", "5 km/min"),
        ("$5", "5 cents"),
        (r"\$5", "5 cents"),
        ("5 dollars", "5 cents"),
        ("€5", "$5"),
        ("5 euros", "$5"),
        ("5%", "5 cm"),
        ("5 liters", "5 gallons"),
        ("5 years", "5 months"),
        ("5 N", "5 J"),
        ("20°C", "20°F"),
        (".5 cm", "5 cm"),
    ],
)
def test_the_same_number_of_another_unit_is_wrong(answer: str, reference: str) -> None:
    assert verdict(answer, reference) == 0.0
    assert verdict(reference, answer) == 0.0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("5 square centimeters", "5 cm^2"),
        (r"5\text{ cm}^{2}", "5 sq cm"),
        ("5 cm^3", "5 mL"),
        ("5 miles per hour", "5 mph"),
        ("60 kilometers an hour", "60 km/hr"),
        ("9.8 meters per second squared", r"9.8\text{ m/s}^2"),
        ("30 miles per gallon", "30 mpg"),
        ("18 dollars per hour", "$18"),
        ("$18", "18"),
        ("5 dollars", "$5"),
        ("$5 million", "5 million"),
        ("5 cm^2", "5"),
        ("12 square units", "12"),
        ("45 degrees", r"45^\circ"),
        ("20 degrees Celsius", "20°C"),
        ("5 years old", "5 years"),
        ("5 apples", "5"),
        (".5 cm", "0.5 cm"),
    ],
)
def test_the_same_number_of_the_same_unit_or_of_none_is_right(answer: str, reference: str) -> None:
    assert verdict(answer, reference) == 1.0
    assert verdict(reference, answer) == 1.0


def test_what_is_not_known_is_told_from_nothing() -> None:
    assert unit_of("cubic yards") == "yd^3"
    assert unit_of("feet per second per second") == unit_of("ft/s^2") == "ft/s^2"
    assert unit_of("red apples") == "red apple" and unit_of("apples per day") == "apples per day"
    assert differ("cm", "cm^2") and differ("%", "cm") and not differ("cm", "apple") and not differ("cm", "cm")


@pytest.mark.parametrize(
    ("answer", "reference", "reward"),
    [
        (r"\text{five}", "5", 1.0),
        ("Twelve", "12", 1.0),
        ("five", "6", 0.0),
        ("five halves", "5", 0.0),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)", 1.0),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "(2,1)", 0.0),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "[1,2)", 0.0),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}", 0.0),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "(1,2,3,4)", 0.0),
    ],
)
def test_a_number_in_a_word_and_a_column_vector_as_a_tuple_are_read(answer: str, reference: str, reward: float) -> None:
    assert verdict(answer, reference) == verdict(reference, answer) == reward
