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
