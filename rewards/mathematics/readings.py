"""What an answer can say."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from rlflow.rewards.mathematics.formulas import Tree
from rlflow.rewards.mathematics.values import Value


@dataclass(frozen=True, slots=True)
class Number:
    value: Value
    last_place: Fraction | None = None
    """What one more in the last digit is worth, where it is written as a decimal: it may be rounded there."""
    is_percentage: bool = False
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Formula:
    """An expression with variables."""

    tree: Tree
    text: str
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Words:
    text: str


@dataclass(frozen=True, slots=True)
class Choice:
    """A letter of a multiple choice, and what stands behind it."""

    letter: str
    content: Reading


@dataclass(frozen=True, slots=True)
class Named:
    """``x = value``."""

    name: str
    value: Reading


@dataclass(frozen=True, slots=True)
class Relation:
    """``difference <operator> 0``; an equation, an inequality, or ``≠``."""

    operator: str
    difference: Tree
    sides: tuple[Reading, Reading]


@dataclass(frozen=True, slots=True)
class Ratio:
    terms: tuple[Fraction, ...]
    text: str
    """Of two terms it may be a time of day: ``8:30``."""


@dataclass(frozen=True, slots=True)
class Numeral:
    """Digits in a base: ``321_5``."""

    digits: str
    base: str


@dataclass(frozen=True, slots=True)
class Collection:
    """Several readings: a set, a list, a tuple or interval, a union, the rows of a matrix."""

    brackets: str
    """As written, ``()``, ``[)``, ``{}``; empty for a bare list; ``union`` and ``matrix``."""
    items: tuple[Reading, ...]


@dataclass(frozen=True, slots=True)
class Nothing:
    """What can equal no answer: a number too large to write down, a division by zero, ``5 = 6``."""


@dataclass(frozen=True, slots=True)
class Unknown:
    text: str
    """Cleaned LaTeX."""


Reading = Number | Formula | Words | Choice | Named | Relation | Ratio | Numeral | Collection | Nothing | Unknown
