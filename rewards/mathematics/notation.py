r"""How answers are written: LaTeX's many forms of one thing become one, numbers and units are told apart.

`clean` leaves a text in which ``\x02`` and ``\x03`` stand where ``\text{`` began and ended.
"""

from __future__ import annotations

import re
import unicodedata

from rlflow.rewards.mathematics.formulas import FUNCTIONS, GREEK

FROM_UNICODE = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2013\u2014\u2010\u2011﹣\uff0d", "-"),
        **dict.fromkeys("\u00d7✕", r"\times "),
        **dict.fromkeys("·⋅∙", r"\cdot "),
        **dict.fromkeys("\u2009\u202f\u00a0\u2007\u3000", " "),
        "÷": r"\div ",
        "π": r"\pi ",
        "θ": r"\theta ",
        "∞": r"\infty ",
        "√": r"\sqrt ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "≈": r"\approx ",
        "±": r"\pm ",
        "∓": r"\mp ",
        "\u222a": r"\cup ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "⟨": "(",
        "⟩": ")",
        "\uff0c": ", ",
        "。": ".",
        "\uff05": "%",
        "²": "^2",
        "³": "^3",
        **{chr(0x2080 + digit): f"_{digit}" for digit in range(10)},
        **{sign: f" {numerator}/{denominator}" for sign, numerator, denominator in (
            ("½", 1, 2), ("⅓", 1, 3), ("⅔", 2, 3), ("¼", 1, 4), ("¾", 3, 4), ("⅕", 1, 5), ("⅖", 2, 5), ("⅗", 3, 5),
            ("⅘", 4, 5), ("⅙", 1, 6), ("⅚", 5, 6), ("⅛", 1, 8), ("⅜", 3, 8), ("⅝", 5, 8), ("⅞", 7, 8),
        )},
    }
)  # fmt: skip

TEXT = re.compile(
    r"\\(?:text(?:normal|bf|it|rm|sf|tt)?|mathrm|mathbf|mathit|mathsf|operatorname\*?|mbox|hbox|rm|boldsymbol|bm|underline)\s*\{([^{}]*)\}"
)
SPACING = re.compile(r"\\(?:displaystyle|textstyle|limits|left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?|(?<!\\)\\!")
SPACE = re.compile(r"(?<!\\)\\(?:q?quad(?![A-Za-z])|[,;:> ])|~")
GROUP = re.compile(r"(?<=\d)(?:\{,\}|\\!,|,\\!\s*|\\!|\\,|\\;|\\ |~|')(?:\\!)?(?=\d{3}(?!\d))")
"""What LaTeX puts between thousands."""
DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]|(?<!\\)\$")
DEGREES = re.compile(r"\s*(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree|°)")
REWRITES = (
    (re.compile(r"\\l[vV]ert(?![A-Za-z])|\\r[vV]ert(?![A-Za-z])|\\mid(?![A-Za-z])"), "|"),
    (re.compile(r"\\langle(?![A-Za-z])"), "("),
    (re.compile(r"\\rangle(?![A-Za-z])"), ")"),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:leq(?:slant)?|le)(?![A-Za-z])|<="), r"\\le "),
    (re.compile(r"\\(?:geq(?:slant)?|ge)(?![A-Za-z])|>="), r"\\ge "),
    (re.compile(r"\\(?:neq|ne)(?![A-Za-z])|!="), r"\\ne "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:varnothing|phi(?=\s*$))(?![A-Za-z])|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\\(?:land|wedge)(?![A-Za-z])"), " and "),
    (re.compile(r"\\(?:lor|vee)(?![A-Za-z])"), " or "),
    (re.compile(r"\*\*(?=\s*[-\d({a-zA-Z])"), "^"),
    (re.compile(r"(?<=\d)\s*x\s*(?=\d)"), "*"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\A\s*(?:minus|negative)\s+(?=[\d.])", re.IGNORECASE), "-"),
)
THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?![\d,]*\d)")
SPACED_THOUSANDS = re.compile(r"(?<![\d.,/])([1-9]\d{0,2}(?: \d{3})+)(?![\d/]|[.,]?\d| \d)")
DOTTED_THOUSANDS = re.compile(
    r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+),(\d{1,2})(?!\d)|(?<![\d.,])(\d{1,3}(?:\.\d{3}){2,})(?![\d,.])"
)
MIXED = re.compile(r"(?<![\d.,/)}])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.,/])")
CURRENCY = re.compile(
    r"^\s*(-?)\s*(?:US\s*\\?\$|\\?\$|€|£|¥|₹|\\(?:euro|pounds)(?![A-Za-z])|Rs\.?(?=\s*\d)|USD|EUR|GBP)\s*(?=-?[\d.])"
)

WORD = re.compile(r"\x02[^\x02\x03]*\x03|(?<![\\A-Za-z])[A-Za-z]{2,}")
NUMBER_WORDS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "fifteen": 15, "twenty": 20,
}  # fmt: skip
"""Where one of them is the whole of an answer."""
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
NO_UNITS = frozenset((
    "or", "and", "not", "nor", "but", "maybe", "perhaps", "possibly", "either", "neither", "to", "than",
    "through", "until", "wrong", "incorrect", "false", "isnt", "if", "minus", "plus", "times", "divided",
    "over", "hundred", "dozen", "of", "is", "are", "was", "equals", "equal", "below", "halves", "thirds", "fourths",
    "fifths", "sixths", "sevenths", "eighths", "ninths", "tenths", "hundredths",
))  # fmt: skip
"""Words after a number that make it another answer, or none."""
POWERS = frozenset(("squared", "cubed", "factorial"))
"""They do so right behind a number; ``5 feet squared`` is a unit."""
REPEATING = re.compile(r"(?<![\d.,])(\d*)\.(\d*)\\(?:overline|bar)\s*\{(\d+)\}")
TWO_LETTER_WORDS = frozenset((
    "no", "on", "up", "so", "it", "he", "we", "us", "me", "my", "is", "to", "be", "by", "do", "go", "if", "in",
    "of", "or", "at", "as", "am", "an",
))  # fmt: skip


def clean(text: str) -> str:
    """Brings the forms of one notation to one form; the meaning stays."""
    if not text.isascii():
        text = "".join(str(unicodedata.decimal(c, c)) for c in text.translate(FROM_UNICODE))
    if "\\" in text or "~" in text or "$" in text or "{,}" in text:
        text = GROUP.sub(",", text)
        text = DEGREES.sub("°", text)
        text = TEXT.sub(_text, text)
        text = SPACE.sub(
            " ",
            SPACING.sub("", DELIMITER.sub(" ", text) if not text.lstrip().startswith("$") or "$" in text[1:] else text),
        )
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    text = THOUSANDS.sub(lambda match: match[1].replace(",", ""), text)
    text = SPACED_THOUSANDS.sub(lambda match: match[1].replace(" ", ""), text)
    text = DOTTED_THOUSANDS.sub(_dotted, text)
    text = REPEATING.sub(_repeating, text)
    return MIXED.sub(r"(\1+\2/\3)", text).strip()


def _text(match: re.Match[str]) -> str:
    content = match[1].strip()
    if content.lower() in ("and", "or") or content.rstrip(".,") == "":
        return f" {content.lower()} "
    return (
        content if len(content) == 1 and content.isalpha() and match[0].startswith(r"\math") else f"\x02{match[1]}\x03"
    )


def _repeating(match: re.Match[str]) -> str:
    r"""Writes ``0.1\overline{6}`` as ``(16-1)/90``."""
    whole, once, again = match.groups()
    above, below = int(whole + once + again) - int(whole + once or "0"), 10 ** len(once) * (10 ** len(again) - 1)
    return rf"(\frac{{{above}}}{{{below}}})"


def _dotted(match: re.Match[str]) -> str:
    return f"{match[1].replace('.', '')}.{match[2]}" if match[1] else match[3].replace(".", "")


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    r"""Splits where a separator stands outside all brackets and environments; their closing kind is not looked at."""
    pieces, depth, begun, position = [], 0, 0, 0
    while position < len(text):
        if text.startswith((r"\begin{", r"\end{"), position):
            depth += 1 if text.startswith(r"\begin", position) else -1
            position = text.find("}", position) + 1 or len(text)
        elif text[position] in "([{":
            depth, position = depth + 1, position + 1
        elif text[position] in ")]}":
            depth, position = depth - 1, position + 1
        elif depth == 0 and (match := separator.match(text, position)):
            pieces.append(text[begun : match.start()])
            begun = position = max(match.end(), position + 1)
        else:
            position += 1
    return [*pieces, text[begun:]]


def words(text: str) -> list[str]:
    r"""Returns the words of a cleaned text: what stands in ``\text{}``, and letters that are no known name."""
    return [
        match[0]
        for match in WORD.finditer(text)
        if match[0] not in FUNCTIONS
        and match[0] not in GREEK
        and match[0] not in ("pi", "infty", "inf", "oo", "infinity")
    ]


def plain_text(text: str) -> str:
    """Returns a cleaned text as words are compared: lower case, single spaces, no closing full stop. Braces stay where
    they hold more than a word, as in ``2^{n+1}``."""
    text = re.sub(r"(?<!\\)\{(\w*)\}|[\x02\x03]", lambda match: f" {match[1] or ''} ", text).replace("\\", "")
    return re.sub(r"\s*([^\w\s])\s*", r"\1", " ".join(text.casefold().split())).strip(" .\"'")
