"""What is wrong with a recipe: one line a problem, all of them at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was given."""

    file: str
    """As the user named it; ``command line`` or ``overrides`` for a value that is in no file."""
    line: int | None = None
    """From 1."""

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to correct."""

    file: str
    line: int | None
    key: str
    """Dotted; empty when the problem is the file's."""
    message: str
    """What is wrong and what to do."""

    @classmethod
    def at(cls, place: Place, key: str, message: str) -> Problem:
        return cls(place.file, place.line, key, message)

    def __str__(self) -> str:
        return ": ".join(part for part in (str(Place(self.file, self.line)), self.key, self.message) if part)


class RecipeError(ValueError):
    """The recipe cannot be run as it is. ``problems`` has everything that is wrong; ``str`` gives a line to each."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        unique = sorted(dict.fromkeys(problems), key=lambda problem: (problem.file, problem.line or 0))
        super().__init__("\n".join(str(problem) for problem in unique))
        self.problems: list[Problem] = unique

    def __reduce__(self) -> tuple[type[RecipeError], tuple[list[Problem]]]:
        return RecipeError, (self.problems,)


def nearest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The word that ``word`` is most likely meant to be, or None. Capitals make no difference where nothing is near."""
    known = list(words)
    if found := difflib.get_close_matches(word, known, n=1, cutoff=cutoff):
        return found[0]
    small = {one.lower(): one for one in known}
    found = difflib.get_close_matches(word.lower(), small, n=1, cutoff=cutoff)
    return small[found[0]] if found else None


def did_you_mean(word: str, words: Sequence[str]) -> str:
    """A remedy for a word that is none of ``words``: the nearest, or all of them."""
    near = nearest(word, words)
    return f"did you mean {near}?" if near else f"valid: {', '.join(sorted(words))}"
