"""Units of measure: the several names of one become one, and two that are known can be told apart."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache

_UNITS = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre",
    "in": "inch inche", "ft": "feet foot", "yd": "yard", "mi": "mile", "mg": "milligram", "g": "gram",
    "kg": "kilogram", "lb": "pound", "oz": "ounce", "s": "sec second", "min": "minute", "h": "hr hour", "day": "",
    "week": "", "month": "", "year": "yr", "l": "liter litre", "gal": "gallon",
    "dollar": "usd", "cent": "", "euro": "eur", "yen": "", "rupee": "", "V": "v volt", "W": "w watt", "A": "amp ampere",
    "N": "n newton", "J": "j joule", "K": "k kelvin", "°C": "c celsius", "°F": "f fahrenheit",
}  # fmt: skip
_NAMES = {name: unit for unit, others in _UNITS.items() for name in (unit, *others.split())}
_COMPOUND = {"mph": "mi/h", "kmph": "km/h", "kph": "km/h", "mpg": "mi/gal"} | dict.fromkeys(
    ("cc", "ml", "milliliter", "millilitre"), "cm^3"
)
_SILENT = frozenset(("unit", "degree", "deg"))
"""They say nothing: ``45 degrees`` is 45."""
_MONEY = frozenset(("dollar", "cent", "euro", "yen", "rupee"))
CURRENCIES = {
    "$": "dollar", "USD": "dollar", "€": "euro", r"\euro": "euro", "EUR": "euro", "¥": "yen", "₹": "rupee",
    "Rs": "rupee",
}  # fmt: skip
"""By what stands before an amount. ``pound`` is taken for the weight."""
ATTACHED = frozenset((
    "mm", "cm", "km", "in", "ft", "yd", "mg", "kg", "lb", "lbs", "oz", "sec", "min", "hr", "hrs", "ml", "mL",
    "mph", "kmph", "hours", "days", "cents", "dollars", "mi", "sq", "cu",
))  # fmt: skip
"""They may follow a number without a space; other letters there are factors."""
LETTERS = frozenset("mgshLlWVANJKCFtd")
PERCENT = frozenset(("percent", "percentage", "pct", "per cent", "percentage point"))

_FACTOR = re.compile(
    r"(?:(?P<kind>sq|square|cu|cubic)\.?\s+|degrees?\s+)?(?P<name>[a-z]+)"
    r"(?:\s*\^?\s*\{?\s*(?P<power>[23])\s*\}?|\s+(?P<word>squared|cubed))?",
    re.IGNORECASE,
)
_POWERS = {"sq": 2, "square": 2, "squared": 2, "2": 2, "cu": 3, "cubic": 3, "cubed": 3, "3": 3, None: 1}
_PER = re.compile(r"\s*(?:/|(?<![a-z])(?:per|an?)(?![a-z]))\s*")


@lru_cache(maxsize=4096)
def unit_of(said: str) -> str:
    """Returns one name for a unit's several: ``cm^2`` for ``square centimeters``, ``mi/h`` for ``mph``.

    Args:
        said: What stands behind a number, in lower case but for a unit of one letter.

    Returns:
        What is not known in the singular; nothing for what says nothing.
    """
    said = said.removeprefix("of ").strip()
    singular = _singular(said)
    if said in PERCENT or singular in _SILENT:
        return said if said in PERCENT else ""
    above, *below = (_factor(part) for part in _PER.split(_COMPOUND.get(singular, said)))
    if above is not None and above[0] in _MONEY:
        return above[0]  # who earns $18 an hour earns $18
    powers: Counter[str] = Counter()
    for factor in below:
        if factor is not None:
            powers[factor[0]] += factor[1]
    if above is None or None in below:
        return singular
    return "/".join([_power(*above), *(_power(*each) for each in sorted(powers.items()))])


def differ(one: str, other: str) -> bool:
    """Whether two units of `unit_of`, or ``%``, are known and are not the same."""
    return one != other and _is_known(one) and _is_known(other)


def _is_known(unit: str) -> bool:
    return unit == "%" or all(part.partition("^")[0] in _UNITS for part in unit.split("/"))


def _factor(said: str) -> tuple[str, int] | None:
    """A unit and its power; None where it is not known."""
    match = _FACTOR.fullmatch(said.strip(" ."))
    if match is None:
        return None
    name = next((_NAMES[name] for name in (match["name"], _singular(match["name"])) if name in _NAMES), None)
    name = name or _NAMES.get(match["name"].lower())
    kind = (match["kind"] or match["word"] or match["power"] or "").lower()
    return None if name is None else (name, _POWERS[kind or None])


def _power(name: str, power: int) -> str:
    return name if power == 1 else f"{name}^{power}"


def _singular(said: str) -> str:
    return said[:-1] if len(said) > 2 and said.endswith("s") else said
