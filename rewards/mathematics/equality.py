"""Whether two readings are one answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from rlflow.rewards.mathematics import units
from rlflow.rewards.mathematics.formulas import Tree, names, parse_formula
from rlflow.rewards.mathematics.readings import (
    Choice,
    Collection,
    Formula,
    Named,
    Nothing,
    Number,
    Numeral,
    Ratio,
    Reading,
    Relation,
    Unknown,
    Words,
)
from rlflow.rewards.mathematics.values import Value, are_same, real, sample_points, value_at

ROUNDED = Fraction(1, 10**6)
"""Largest relative difference between a number and a decimal that is rounded or cut off: six digits or more."""
NOISE = Fraction(1, 10**9)
"""Largest relative difference of two decimals that were computed in floating point. Whole numbers have no noise."""
NAME = re.compile(
    r"(?P<letter>[A-Za-z])|(?P<command>\\[A-Za-z]+)|(?P<indexed>\\?[A-Za-z]+_\w+)|(?P<segment>[A-Z]{2,3})"
)

Undecided = Callable[[], bool]
"""Compares what is not read here."""


def are_equal(answer: Reading, reference: Reading, undecided: Undecided) -> bool:
    """Whether an answer is the reference.

    Args:
        undecided: Is asked, once, where a side holds what only a computer algebra system may know.
    """
    answer, reference = _without_repeats(answer), _without_repeats(reference)
    if isinstance(answer, Nothing) or isinstance(reference, Nothing):
        return False
    if holds_unknown(answer) or holds_unknown(reference):
        return undecided()
    return _equal(answer, reference)


def _without_repeats(reading: Reading) -> Reading:
    """Returns the one thing that a list says in several forms: ``3/2`` and ``1.5``."""
    if not isinstance(reading, Collection) or reading.brackets:
        return reading
    first, *others = reading.items
    return first if all(_equal(first, other) for other in others) else reading


def holds_unknown(reading: Reading) -> bool:
    """Whether a part of a reading is for math-verify to read."""
    match reading:
        case Unknown():
            return True
        case Named(value=inner) | Choice(content=inner):
            return holds_unknown(inner)
        case Collection(items=items):
            return any(holds_unknown(item) for item in items)
        case Relation(sides=sides):
            return any(holds_unknown(side) for side in sides)
    return False


def _equal(answer: Reading, reference: Reading) -> bool:
    match answer, reference:
        case (Nothing(), _) | (_, Nothing()):
            return False
        case Choice(), _:
            return _choice_equal(answer, reference)
        case _, Choice():
            return _choice_equal(reference, answer)
        case Named(), Named():
            return _are_one_name(answer.name, reference.name) and _equal(answer.value, reference.value)
        case (Named() as named, Relation("=") as relation) | (Relation("=") as relation, Named() as named):
            return isinstance(named.value, Number | Formula) and _proportional(_difference(named), relation.difference)
        case Named(), _:
            return _equal(answer.value, reference)
        case _, Named():
            return _equal(answer, reference.value)
        case Relation(operator), Relation():
            is_directed = operator not in ("=", r"\ne")
            return operator == reference.operator and _proportional(
                answer.difference, reference.difference, positive=is_directed
            )
        case (Relation("=") as relation, Number() as number) | (Number() as number, Relation("=") as relation):
            return _asked_for(relation, number)
        case Collection(), Collection():
            return _collections_equal(answer, reference)
        case Number(), Number():
            return _numbers_equal(answer, reference)
        case (Ratio() as ratio, Number() as number) | (Number() as number, Ratio() as ratio):
            return len(ratio.terms) == 2 and ratio.terms[1] != 0 and ratio.terms[0] / ratio.terms[1] == number.value
        case Ratio(), Ratio():
            return _ratios_equal(answer, reference)
        case Numeral(), Numeral():
            return answer == reference
        case Number(value, None), Numeral(digits):  # whoever asks for a base has said which
            return digits.lstrip("-").isdecimal() and value == int(digits)
        case Formula(), Formula():
            return _formulas_equal(answer.tree, reference.tree)
        case Formula(tree=("*", ("number", value), ("name", letter))), Number() if letter in units.LETTERS:
            return _numbers_equal(Number(value), reference)
        case Words(), Words():
            is_letter = len(answer.text) == 1
            return answer.text == reference.text or (is_letter and answer.text.lower() == reference.text.lower())
        case (Words() as words, Formula() as formula) | (Formula() as formula, Words() as words):
            is_letter = len(words.text) == 1
            return words.text.casefold() == formula.text.casefold() or (
                is_letter and _formulas_equal(parse_formula(words.text), formula.tree)
            )
        case (Words("e" | "i" as letter), Number() as number) | (Number() as number, Words("e" | "i" as letter)):
            return _numbers_equal(Number(value_at((letter,), {})), number)
    return False


def _asked_for(relation: Relation, number: Number) -> bool:
    """Whether an equation says what a sum or product is, as ``m + n = 34`` does: one of a single variable, or with
    powers, is a step on the way, and says nothing of the answer."""
    formulas = [side for side in relation.sides if isinstance(side, Formula)]
    constants = [side for side in relation.sides if isinstance(side, Number) and side.value != 0]
    if len(formulas) != 1 or len(constants) != 1 or "'^'" in str(formulas[0].tree):
        return False
    return len(names(formulas[0].tree)) > 1 and _numbers_equal(constants[0], number)


def _choice_equal(choice: Choice, other: Reading) -> bool:
    """The letter of a choice is enough, and so is what stands behind it; where both have both, both must agree."""
    if isinstance(other, Choice):
        return choice.letter == other.letter and _equal(choice.content, other.content)
    return (isinstance(other, Words) and other.text == choice.letter) or _equal(choice.content, other)


def _are_one_name(answer: str, reference: str) -> bool:
    """``x`` is not ``y`` and ``x_1`` not ``x_2``, but either may be called ``AB``, which is ``BA``."""
    answer, reference = (re.sub(r"[\s{}]", "", name) for name in (answer, reference))
    kinds = [match.lastgroup if (match := NAME.fullmatch(name)) else None for name in (answer, reference)]
    return None in kinds or kinds[0] != kinds[1] or reference in (answer, answer[::-1])


def _difference(named: Named) -> Tree:
    value = named.value
    assert isinstance(value, Number | Formula)
    return (
        "-",
        ("name", named.name.lstrip("\\")),
        value.tree if isinstance(value, Formula) else ("value", value.value),
    )


def _numbers_equal(answer: Number, reference: Number) -> bool:
    """Units differ only where both are given and known; ``50%`` is 50 and 0.5."""
    if units.differ(*("%" if number.is_percentage else number.unit for number in (answer, reference))):
        return False
    if _close(answer, reference):
        return True
    if answer.is_percentage == reference.is_percentage:
        return False
    return _close(*(_as_share(number) if number.is_percentage else number for number in (answer, reference)))


def _as_share(number: Number) -> Number:
    return Number(number.value / 100, None if number.last_place is None else number.last_place / 100)


def _close(first: Number, second: Number) -> bool:
    """Whether two numbers are one, or a decimal is the other, rounded or cut off where it ends."""
    if are_same(first.value, second.value):
        return True
    decimals = [number for number in (first, second) if number.last_place is not None]
    if not decimals:
        return False
    one, other = first.value, second.value
    if not (isinstance(one, Fraction) and isinstance(other, Fraction)):
        one, other = real(one), real(other)
    difference, size = abs(one - other), max(abs(one), abs(other))
    exact = isinstance(difference, Fraction)
    noise, rounded = (NOISE, ROUNDED) if exact else (real(NOISE), real(ROUNDED))
    are_whole = exact and one.denominator == other.denominator == 1
    if difference <= noise * size and not are_whole:
        return True
    place = max(number.last_place for number in decimals if number.last_place is not None)
    place = place if exact else real(place)
    is_cut_off = len(decimals) == 1 and abs(real(decimals[0].value)) < real(size) and difference < place
    return bool(difference <= rounded * size and (difference <= place / 2 or is_cut_off))


def _ratios_equal(answer: Ratio, reference: Ratio) -> bool:
    """``2:4`` is ``1:2``; ``2:40`` may be a time of day, and is only itself."""
    if answer.text == reference.text:
        return True
    if len(answer.terms) != len(reference.terms) or 0 in (*answer.terms, *reference.terms):
        return False
    return len({first / second for first, second in zip(answer.terms, reference.terms, strict=True)}) == 1


def _collections_equal(answer: Collection, reference: Collection) -> bool:
    if "()" in (answer.brackets, reference.brackets):
        answer, reference = _without_columns(answer), _without_columns(reference)
    kinds = {answer.brackets, reference.brackets}
    if len(answer.items) != len(reference.items):
        return False
    if len(kinds) > 1 and not ("" in kinds and kinds & {"()", "{}", "[]", "union"}):
        return False
    if kinds <= {"", "{}", "union"}:
        return _equal_in_any_order(answer.items, reference.items)
    return all(_items_equal(first, second) for first, second in zip(answer.items, reference.items, strict=True))


def _without_columns(collection: Collection) -> Collection:
    """Returns a column vector as a tuple, and what is none as it is."""
    columns = [row.items for row in collection.items if isinstance(row, Collection) and row.brackets == "row"]
    if not columns or any(len(items) != 1 for items in columns):
        return collection
    return Collection("()", tuple(items[0] for items in columns))


def _equal_in_any_order(answers: Sequence[Reading], references: Sequence[Reading]) -> bool:
    rest = list(references)
    for answer in answers:
        found = next((index for index, reference in enumerate(rest) if _items_equal(answer, reference)), None)
        if found is None:
            return False
        rest.pop(found)
    return True


def _items_equal(answer: Reading, reference: Reading) -> bool:
    """Among several, what is counted matters: 5 apples and 3 pears are not 5 pears and 3 apples."""
    if isinstance(answer, Number) and isinstance(reference, Number) and answer.unit and reference.unit:
        return answer.unit == reference.unit and _numbers_equal(answer, reference)
    return _equal(answer, reference)


def _formulas_equal(first: Tree, second: Tree) -> bool:
    pairs = list(_values(first, second))
    return len(pairs) > 1 and all(are_same(one, other) for one, other in pairs)


def _proportional(first: Tree, second: Tree, *, positive: bool = False) -> bool:
    """Whether one formula is a constant times the other: ``2x = 4`` and ``x - 2 = 0``."""
    pairs = [(one, other) for one, other in _values(first, second) if one != 0 and other != 0]
    factors = [one / other for one, other in ((real(one), real(other)) for one, other in pairs)]
    if len(factors) < 2 or (positive and not all(mp_real > 0 for mp_real in factors)):
        return False
    return all(are_same(factors[0], factor) for factor in factors[1:])


def _values(first: Tree, second: Tree) -> list[tuple[Value, Value]]:
    both = str(first) + str(second)
    whole = "'!'" in both or "'binomial'" in both
    pieces = any(f"'{name}'" in both for name in ("abs", "floor", "ceiling"))
    points = sample_points(names(first) | names(second), 8 if pieces else 4, signed=pieces, whole=whole)
    values = []
    for point in points:
        try:
            values.append((value_at(first, point), value_at(second, point)))
        except (ArithmeticError, ValueError):
            continue
    return values
