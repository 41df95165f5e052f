"""What the policy and other people's code wrote, as a terminal may show it."""

from __future__ import annotations

import unicodedata


def visible(text: str) -> str:
    """The text with control characters, which a terminal would obey, as escapes; line ends and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(c) if c not in "\n\t" and unicodedata.category(c) in _UNSEEN else c for c in text)


_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
_JOINERS = "\u200c\u200d"
"""Format characters that scripts and emoji are written with."""


def _escaped(character: str) -> str:
    return character if character in _JOINERS else character.encode("unicode_escape").decode()


def one_line(text: str) -> str:
    """The text in one line, without control characters."""
    return visible(" ".join(text.split()))
