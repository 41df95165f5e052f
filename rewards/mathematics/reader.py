"""The text of an answer becomes a `Reading`: one, of the whole of it, never of a part.

What is neither mathematics of `rlflow.rewards.mathematics.formulas` nor words is `Unknown`, and left to math-verify.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from rlflow.rewards.mathematics.formulas import (
    MAX_NESTING,
    Tree,
    Unreadable,
    names,
    parse_formula,
)
from rlflow.rewards.mathematics.notation import (
    CURRENCY,
    NO_UNITS,
    NUMBER_WORDS,
    POWERS,
    SCALES,
    TWO_LETTER_WORDS,
    WORD,
    clean,
    plain_text,
    split,
    words,
)
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
from rlflow.rewards.mathematics.units import ATTACHED, CURRENCIES, LETTERS, PERCENT, unit_of
from rlflow.rewards.mathematics.values import are_same, value_at

MAX_ANSWER_CHARACTERS = 400
"""An answer that is longer, and not the reference's own text, is wrong without being read."""

PLAIN_NUMBER = re.compile(r"\s*([-+]?)\s*(\\?\$)?(\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(\.\d*)?(\\?%)?\s*\Z", re.ASCII)
DECIMAL = re.compile(
    r"[-+]?\s*(?:\d+(?:\.(\d*))?|\.(\d+))(?:[eE]([-+]?\d{1,6})|\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{?\s*([-+]?\d{1,6})\s*\}?)?\Z"
)
CHOICE = re.compile(
    r"\\?\(?\s*\x02?\s*\(?([A-J])(?:\)|[.:]\x03?(?=\s)|\)?\x03)"
    r"(?!\s*:?\s*(?:or|and)(?![A-Za-z]))\s*:?\s*(.*)\Z",
    re.DOTALL,
)
LONE_LETTER = re.compile(r"[(\x02\s]*([A-Za-z])[)\x03\s]*\.?\Z")
CLOCK_OR_DATE = re.compile(
    r"\d{1,2}:\d\d(?::\d\d)?\s*\x02?\s*(?:[ap]\.?\s?m\.?)?\x03?\Z|\d{4}-\d\d-\d\d\Z|\d{1,2}/\d{1,2}/\d{4}\Z",
    re.IGNORECASE,
)
RATIO = re.compile(r"\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+\Z")
NUMERAL = re.compile(r"[-+]?[0-9A-F]+(?:\.[0-9A-F]+)?\s*_\s*(?:\d+|\{\s*\x02?\s*[\w ]+\x03?\s*\})\Z")
LIST = re.compile(r"\s*(?:[,;]\s*(?:(?:and|or)(?![A-Za-z]))?|(?<![A-Za-z])(?:and|or)(?![A-Za-z]))\s*")
RELATION = re.compile(r"\s*(\\(?:le|ge|ne|approx|equiv|simeq|sim|in)(?![A-Za-z])|<|>|=)\s*")
UNION = re.compile(r"\s*\\cup(?![A-Za-z])\s*|\s+U\s+")
MATRIX = re.compile(r"\\begin\{([pb]?matrix|array)\}\s*(?:\{[clr|\s]*\})?(.*)\\end\{\1\}\Z", re.DOTALL)
BRACKETED = re.compile(r"(\\\{|[(\[{])(.*)(\\\}|[)\]]|(?<!\\)\})\Z", re.DOTALL)
NAME = re.compile(
    r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_(?:\w|\{\w+\}))?'*(?:\s*\([^()]*\))?\Z|[A-Z]{2,3}\Z|(?:m\s*)?\\angle\s*\{?[A-Z]+\}?\Z"
)
LETTER_UNIT = re.compile(r"([-+]?[\d.]+)\s+([A-Za-z])\Z")
EAST_ASIAN_UNIT = re.compile(r"(?<=[\d)}%°])\s*[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]{1,4}(?<![万亿千百十半萬億])\Z")
FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


def read(answer: str) -> Reading:
    """Reads the whole of an answer."""
    return _plain_number(answer) or _read(answer)


def _plain_number(answer: str) -> Number | None:
    """The quick way of what most answers are: digits, with separators, a sign, a currency or per cent."""
    if len(answer) > 60 or not (match := PLAIN_NUMBER.match(answer)):
        return None
    sign, dollar, whole, decimals, percent = match.groups()
    unit = "dollar" if dollar else ""
    digits = f"{sign}{whole.replace(',', '') or '0'}"
    if not decimals:
        return Number(Fraction(int(digits)), None, bool(percent), unit)
    places = len(decimals) - 1
    return Number(Fraction(int(digits + decimals[1:]), 10**places), Fraction(1, 10**places), bool(percent), unit)


@lru_cache(maxsize=4096)
def _read(answer: str) -> Reading:
    text = clean(answer).rstrip(" .").lstrip()
    text = text if re.match(r"\.\d", text) else text.lstrip(" .")
    depth = deepest = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    return Nothing() if deepest > MAX_NESTING else _read_cleaned(text)


def _read_cleaned(text: str) -> Reading:
    text = text.strip()
    if text.startswith("{") and text.endswith("}") and len(split(text[1:-1], re.compile(r"\}"))) == 1:
        text = text[1:-1].strip()
    if CLOCK_OR_DATE.match(text):
        return Words(plain_text(text))
    if match := LONE_LETTER.match(text):
        return Words(match[1])
    if (number := NUMBER_WORDS.get(text.strip("\x02\x03 ").casefold())) is not None:
        return Number(Fraction(number))
    if RATIO.match(text):
        return Ratio(tuple(Fraction(term.strip()) for term in text.split(":")), plain_text(text))
    if NUMERAL.match(text):
        return Numeral(*re.sub(r"[\s{}()\x02\x03]", "", text).split("_"))
    if match := MATRIX.match(text):
        rows = [row for row in split(match[2], re.compile(r"\\\\(?:\[[^\]]*\])?|\\cr")) if row.strip(" \n\\")]
        return Collection(
            "matrix",
            tuple(
                Collection("row", tuple(map(_read_cleaned, split(row.replace(r"\hline", ""), re.compile("&")))))
                for row in rows
            ),
        )
    if (match := CHOICE.match(text)) and match[2]:
        content = match[2].lstrip(" :\x03")
        said = _read_cleaned(content if content.count("\x02") == content.count("\x03") else content[:-1])
        return Words(plain_text(text)) if _names_choices(said) else Choice(match[1], said)
    if r"\pm" in text or r"\mp" in text:
        return _plus_and_minus(text)
    return _structure(text)


def _names_choices(reading: Reading) -> bool:
    """Whether what stands behind a letter is another: ``A. B`` chooses neither."""
    match reading:
        case Choice():
            return True
        case Words(text=text):
            return text in set("ABCDEFGHIJ")
        case Collection(items=items):
            return any(map(_names_choices, items))
    return False


def _structure(text: str) -> Reading:
    """Reads lists, relations, unions and brackets, in this order, before it reads one expression."""
    pieces = [piece for piece in split(re.sub(r"^(?:either|both)\s", "", text), LIST) if piece.strip()]
    if len(pieces) > 1:
        return _list(pieces)
    sides = split(text, RELATION)
    if len(sides) > 1 and not (words(text) and "=" in text and len(sides) > 3):
        return _relation(sides, [match[1] for match in _separators(text, sides)], text)
    pieces = split(text, UNION)
    if len(pieces) > 1:
        return Collection("union", tuple(map(_read_cleaned, pieces)))
    if (
        (match := BRACKETED.match(text))
        and len(items := split(match[2], re.compile("[,;]"))) > 1
        and _is_one_bracket(text)
    ):
        brackets = f"{match[1][-1]}{match[3][-1]}"
        if all(item.strip() for item in items):
            return Collection(brackets, tuple(map(_read_cleaned, items)))
    elif match and match[1] == r"\{" and _is_one_bracket(text):
        return Collection("{}", (_read_cleaned(match[2]),))
    return _expression(text)


def _is_one_bracket(text: str) -> bool:
    """Whether the bracket that opens a text closes at its end."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and position > 0:
            return position == len(text) - 1
    return False


def _list(pieces: Sequence[str]) -> Reading:
    items = [_read_cleaned(piece) for piece in pieces]
    if (
        len(items) > 1
        and all(isinstance(item, Named) for item in items[:1])
        and not any(isinstance(item, Named) for item in items[1:])
    ):
        first = items[0]
        assert isinstance(first, Named)
        items = [first, *(Named(first.name, item) for item in items[1:])]
    return Collection(
        "", tuple(dict.fromkeys(items)) if not any(isinstance(item, Unknown) for item in items) else tuple(items)
    )


def _separators(text: str, sides: Sequence[str]) -> list[re.Match[str]]:
    found, position = [], 0
    for side in sides[:-1]:
        match = RELATION.match(text, position + len(side))
        assert match is not None
        found.append(match)
        position = match.end()
    return found


def _relation(sides: list[str], operators: list[str], text: str) -> Reading:
    sides = [side.strip() for side in sides]
    if not all(sides):
        return Words(plain_text(text))
    if operators[0] == r"\in" and len(sides) == 2:
        return _read_cleaned(sides[1])
    while len(sides) > 2 and operators[-1] in (r"\approx", r"\sim", r"\simeq"):
        sides.pop()
        operators.pop()
    if r"\equiv" in operators:
        return Words(plain_text(text))
    if set(operators) <= {"=", r"\approx"}:
        return _equation(sides, text)
    if len(sides) == 3 and operators[0] in FLIPPED and operators[1] in FLIPPED:
        return _double_inequality(sides, operators, text)
    if len(sides) == 2 and operators[0] in (*FLIPPED, r"\ne"):
        return _inequality(sides, operators[0], text)
    return Unknown(text)


def _equation(sides: list[str], text: str) -> Reading:
    """``x = 3 + 4 = 7`` is named 7 where all that follows the name agrees; two formulas are an equation."""
    readings = [_read_cleaned(side) for side in sides]
    if NAME.match(sides[0]) or (isinstance(readings[0], Words) and not NO_UNITS.intersection(readings[0].text.split())):
        if len(sides) == 2 or _agree(readings[1:]):
            return Named(sides[0], readings[-1])
        return Nothing()
    if NAME.match(sides[-1]) and isinstance(readings[-1], Formula | Words) and len(sides) == 2:
        return Named(sides[-1], readings[0])
    if all(isinstance(reading, Number) for reading in readings):
        return readings[-1] if _agree(readings) else Nothing()
    first, last = readings[0], readings[-1]
    if isinstance(first, Formula | Number) and isinstance(last, Formula | Number):
        if len(sides) > 2 and not _agree(readings[1:]):
            return Nothing() if all(isinstance(reading, Number) for reading in readings[1:]) else Unknown(text)
        return Relation("=", ("-", _tree(first), _tree(last)), (first, last))
    return Unknown(text)


def _agree(readings: Sequence[Reading]) -> bool:
    """Whether numbers are one; of other readings that all are formulas, which are not compared."""
    if all(isinstance(reading, Number) for reading in readings):
        values = [reading.value for reading in readings if isinstance(reading, Number)]
        return all(are_same(values[0], value) for value in values[1:])
    return all(isinstance(reading, Formula | Number) for reading in readings) and isinstance(readings[0], Formula)


def _tree(reading: Formula | Number) -> Tree:
    return reading.tree if isinstance(reading, Formula) else ("value", reading.value)


def _inequality(sides: list[str], operator: str, text: str) -> Reading:
    first, second = _read_cleaned(sides[0]), _read_cleaned(sides[1])
    if operator != r"\ne":
        if NAME.match(sides[1]) and isinstance(first, Number):
            first, second, sides, operator = second, first, sides[::-1], FLIPPED[operator]
        if NAME.match(sides[0]) and isinstance(second, Number):
            infinity = Words("infinity")
            if operator in ("<", r"\le"):
                return Collection("()" if operator == "<" else "(]", (Words("-infinity"), second))
            return Collection("()" if operator == ">" else "[)", (second, infinity))
    if isinstance(first, Formula | Number | Words) and isinstance(second, Formula | Number):
        tree = (
            first.tree
            if isinstance(first, Formula)
            else ("value", first.value)
            if isinstance(first, Number)
            else ("name", first.text)
        )
        if operator in (">", r"\ge"):
            return Relation(FLIPPED[operator], ("-", _tree(second), tree), (second, first))
        return Relation(operator, ("-", tree, _tree(second)), (first, second))
    return Unknown(text)


def _double_inequality(sides: list[str], operators: list[str], text: str) -> Reading:
    if operators[0] in (">", r"\ge"):
        sides, operators = sides[::-1], [FLIPPED[operator] for operator in reversed(operators)]
    low, high = _read_cleaned(sides[0]), _read_cleaned(sides[2])
    if not NAME.match(sides[1]) or not set(operators) <= {"<", r"\le"}:
        return Unknown(text)
    return Collection(("(" if operators[0] == "<" else "[") + (")" if operators[1] == "<" else "]"), (low, high))


def _plus_and_minus(text: str) -> Reading:
    both = [text.replace(r"\pm", sign).replace(r"\mp", other) for sign, other in (("+", "-"), ("-", "+"))]
    readings = [_read_cleaned(re.sub(r"^\+|(?<=[=(,])\s*\+", "", side.strip())) for side in both]
    if any(isinstance(reading, Unknown) for reading in readings):
        return Unknown(text)
    items: list[Reading] = []
    for reading in readings:
        items += reading.items if isinstance(reading, Collection) and reading.brackets == "" else [reading]
    return Collection("", tuple(items))


def _expression(text: str) -> Reading:
    """Reads one number or formula with its unit, or words."""
    currency = CURRENCY.match(text)
    unit = next((unit for sign, unit in CURRENCIES.items() if sign in currency[0]), "") if currency else ""
    text = CURRENCY.sub(r"\1", text)
    if re.fullmatch(r"[-+]?\s*(?:\\infty|infinity|inf|oo)", text):
        return Words("-infinity" if text.startswith("-") else "infinity")
    core, said = _without_unit(text)
    scale = SCALES.get(said, 1)
    is_percentage = core.endswith("%") or said in PERCENT
    core = core.rstrip("%").strip()
    if _is_prose(core):
        return Words(plain_text(text))
    try:
        tree = parse_formula(core)
        if names(tree):
            return Formula(tree, core, said)
        value = value_at(tree, {}) * scale
    except Unreadable:
        has_words = any(len(word) > 2 for word in words(text))  # dx is none
        return Words(plain_text(text)) if has_words or "\\" not in text else Unknown(text)
    except (ArithmeticError, ValueError):
        return Nothing()
    return Number(value, _last_place(core, scale), is_percentage, unit if scale > 1 or is_percentage else unit or said)


def _last_place(core: str, scale: int) -> Fraction | None:
    match = DECIMAL.match(core)
    if not match or (match[1] is None and match[2] is None):
        return None
    exponent = int(match[3] or match[4] or 0)
    if abs(exponent) > 5000:
        return None
    return Fraction(scale) * Fraction(10) ** (exponent - len(match[1] or match[2] or ""))


def _without_unit(text: str) -> tuple[str, str]:
    """Splits ``8 cm`` into ``8`` and ``cm``; words that make another answer stay, so that it is read as words."""
    inside = text[1:-1] if text.startswith("\x02") and text.endswith("\x03") and text.count("\x02") == 1 else text
    text = inside.strip()
    if match := LETTER_UNIT.match(text):
        return (match[1], unit_of(match[2])) if match[2] in LETTERS else (text, "")
    text = EAST_ASIAN_UNIT.sub("", re.sub(r"°\s*([CF])\Z", r" degrees \1", text))
    for match in WORD.finditer(text):
        word, start = match[0], match.start()
        before = text[:start].rstrip()
        attached = start > 0 and text[start - 1] not in " \x03°%" and word[0] != "\x02"
        is_unit = word in ATTACHED if attached or len(word) == 2 else bool(words(word))
        if is_unit and before and not before.endswith(("(", "^", "_", "+", "-", "*", "/", "=")):
            said = " ".join(re.sub(r"[\x02\x03]", " ", text[start:]).split()).casefold().strip(". ")
            parts = re.findall(r"[a-z]+", said)
            if not re.search(r"(?<![\^{])\d(?!\s*$)|(?<![\^{a-z])\d|[=<>]", said) and not (
                NO_UNITS.intersection(parts) or POWERS.intersection(parts[:1])
            ):
                return before.rstrip("-"), unit_of(said)
            return text, ""
    return text, ""


def _is_prose(text: str) -> bool:
    """Whether letters are words and not factors: ``Evelyn``, ``no``, ``twice x``; not ``xyz + 1``, ``2ab``."""
    found = words(text)
    if text.isalpha():
        return bool(found) and (len(text) > 2 or text.lower() in TWO_LETTER_WORDS)
    short = re.search(r"[-+*/^=\d]", text) is not None
    return any("\x02" in word or len(word) > (3 if short else 2) or word.lower() in TWO_LETTER_WORDS for word in found)
