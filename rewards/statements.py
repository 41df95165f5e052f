r"""The answer in a sentence: what follows ``the answer is``, and what a solution without any marker ends in.

Formulas are hidden behind single characters of Unicode's private area while a sentence is taken apart, so that a comma,
a full stop or a word in one does not end it.
"""

from __future__ import annotations

import re

from rlflow.rewards.mathematics.notation import TEXT

FORMULA = re.compile(
    r"\$\$(?P<display>.+?)\$\$|\\\[(?P<bracket>.+?)\\\]|\\\((?P<paren>.+?)\\\)"
    r"|(?<![\\$])\$(?=[^\s$])(?P<dollar>(?:[^$\n]|\\\$)*?[^\s$\\])\$(?!\d)"
    r"|\\begin\{(?P<name>align\*?|equation\*?|gather\*?)\}(?P<body>.+?)\\end\{(?P=name)\}",
    re.DOTALL,
)
ENVIRONMENT = re.compile(r"\\(?:begin|end)\{\w+\*?\}(?:\{[clr|]*\})?")
HIDDEN = r"[\ue000-\uf8ff]"
SENTENCE_END = re.compile(r"[.!?](?=\s|$)(?<!\bRs\.)(?<!\bapprox\.)|。|\n")
DIGITS = r"(?:\d+(?:,\d{3})+(?!\d)|\d+(?!\d))?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+(?![A-Za-z]))?"
NUMBER = rf"[-+\u2212]?(?:[$€£¥]\s?)?[-\u2212]?{DIGITS}(?::\d+)*%?"
ITEM = re.compile(rf"{HIDDEN}|(?<![\d.,])(?:(?<!\d)[-\u2212])?[$€£¥]?{DIGITS}(?:/\d+|:\d+)?%?")
"""A formula, or a number in prose."""
LETTER = r"(?<![A-Za-z])[a-zA-Z](?=\s*[-+*/^=<>]|[)\]])"
ATOM = rf"(?:{HIDDEN}|{NUMBER}(?:[a-z](?![A-Za-z])|!)?|{LETTER}|\\[A-Za-z]+|sqrt|pi(?![A-Za-z])|\^)"
OPERATOR = r"(?:[-+*/^=<>,;\u00d7÷\u2212·≤≥]|\*\*|\\times|\\cdot|(?:,\s*)?(?:and|or)(?![A-Za-z]))"
SPAN = re.compile(rf"[(\[{{|]*{ATOM}[)\]}}|]*(?:\s*(?:{OPERATOR}\s*)?[(\[{{|]*{ATOM}[)\]}}|]*)*")
"""Numbers and formulas with nothing but signs, brackets, ``and`` and ``or`` between them."""
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
BARE_WORDS = frozenset((
    "and", "or", "sqrt", "pi", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "infty",
    "infinity",
))  # fmt: skip


def _any_of(words: str) -> str:
    return f"(?:{'|'.join(words.split()).replace('_', ' ')})"


FILLERS = _any_of(
    "simply therefore thus then just exactly equal_to equals given_by option choice clearly the_number a_total_of "
    "still indeed now found_to_be approximately about that letter as_follows only of_course"
)
FILLER = re.compile(rf"(?:[\s*:,]|{FILLERS}(?![A-Za-z]))+", re.IGNORECASE)
JOINING = _any_of("and so which since because as where but with while for he she it they we I this that there")
SUBORDINATE = _any_of("because since which where when while after for per each in on at from as so if that with by who")
CLAUSE = re.compile(
    rf"\s*[,;:\u2014\u2013(]\s*{JOINING}\s+(?![\d$\\(\ue000-\uf8ff])|\s[\u2014\u2013]\s|\s\(|\b{SUBORDINATE}\s"
    r"|\s*,\s*(?:not|rather than|instead of)\s|;\s+(?!(?:and|or)\b)(?=[a-z]{2})|\s-\s+(?=[a-z]{3})"
    r"|\s*,\s*(?:right|correct|ok|okay|of course)\b|\s+and\s+(?:that|it|this|he|she|they|we)\b",
    re.IGNORECASE,
)
QUALIFIERS = _any_of(
    "or not less more greater fewer least most between over under above below never up than either neither both and"
)
QUALIFIED = re.compile(rf"\b{QUALIFIERS}\b", re.IGNORECASE)
VERBS = _any_of(
    "is are has have had was were will would gets? costs? takes? makes? equals? needs? pays? they he she there we total"
)
VERB = re.compile(rf"\b{VERBS}\b", re.IGNORECASE)
HEDGES = _any_of(
    "or maybe perhaps possibly not than least most between never neither nor except from_\\S+_to not_equal_to"
)
UP_TO = r"(?<!add )(?<!adds )(?<!sums )(?<!comes )\bup to"
HEDGE = re.compile(
    rf"(?:\b{HEDGES}|n't|{UP_TO}|[<>≠]=?)\s*(?:(?:it is|it's|be|a|an|the)\s+)?[$(\[\s]*$",
    re.IGNORECASE,
)
OPERATION = re.compile(
    rf"\b{_any_of('minus negative under over below square_of cube_of root_of')}\s*[$(\[\s]*$", re.IGNORECASE
)
"""Before a number it makes another of it; before an equation it does so on the left of it alone."""
SHORT = re.compile(r"\(?[A-Z]\)?|yes|no|true|false", re.IGNORECASE)
"""Answers without a number that may come before a reason with one."""
NEGATION = re.compile(r"\s*(?:n't|not|never|no longer|neither)\b", re.IGNORECASE)
AFTER_NEGATION = re.compile(
    r"[,;.]?\s*\b(?:but|rather|instead|it is|it's|it should be)\s+(?:rather\s+|it is\s+)?", re.IGNORECASE
)


STEPS = re.compile(r"[\d)]\s*=[^=]*,[^=]*=")
"""Equations one after the other, of which the last has the answer: ``3 + 4 = 7, 7 * 2 = 14``."""


def is_bare(line: str) -> bool:
    r"""Whether a line is an answer and no sentence: no words but ``and``, ``or``, functions, those of ``\text{}``."""
    line = re.sub(r"(?<=[\d\s])[a-zA-Z]{2}\.?$", "", ENVIRONMENT.sub("", TEXT.sub("", line.strip())))
    found = {word.lower() for word in WORD.findall(line)}
    return (
        not found - BARE_WORDS
        and not STEPS.search(line)
        and (not found & {"and", "or"} or re.search(r"\d|\\", line) is not None)
    )


def answer_of_sentence(rest: str, *, negated: bool = False) -> str | None:
    """Reads the answer from what follows ``the answer is``.

    Args:
        rest: The text after it.
        negated: It was ``is not``.

    Returns:
        A formula, a number with its unit, a list, or the words as they stand; None where none is stated.
    """
    hidden, formulas = _hide(rest.lstrip())
    stated = _of_sentence(hidden, negated)
    return None if stated is None else _show(stated, formulas)


def _of_sentence(rest: str, negated: bool) -> str | None:
    sentence = first_sentence(rest)
    if negated or NEGATION.match(sentence):
        following = AFTER_NEGATION.search(rest, 1)
        return (
            _of_sentence(rest[following.end() :], False)
            if following and following.start() <= len(sentence) + 1
            else None
        )
    filler = FILLER.match(sentence)
    stated = sentence[filler.end() :] if filler else sentence
    for clause in CLAUSE.finditer(stated):
        before = stated[: clause.start()]
        if (
            not ITEM.search(stated, clause.end())
            or re.search(rf"\d|{HIDDEN}|\\", before)
            or SHORT.fullmatch(before.strip(" ,;:"))
        ):
            return _only_number(before) if before else stated
    return _only_number(stated)


def _only_number(stated: str) -> str:
    """Returns the number that words lead up to, where it is the only one and nothing qualifies it; else the whole."""
    lead = re.match(r"(?:[A-Za-z']+\s+)+", stated)
    items = list(ITEM.finditer(stated))
    if not lead or len(items) != 1 or QUALIFIED.search(stated) or set(lead[0].lower().split()) <= BARE_WORDS:
        return stated
    is_formula = re.match(HIDDEN, items[0][0]) is not None
    return stated[items[0].start() :] if is_formula or VERB.search(lead[0]) else stated


def answer_of_solution(text: str) -> str | None:
    """Reads the answer from the end of a text that states none: its last formula or number, as far as it is one, as in
    ``(3, 4)``, ``2 or 3``, ``7 * 8 = 56``. One behind ``or``, ``not``, ``at least`` and their like is no answer."""
    hidden, formulas = _hide(text)
    last = None
    for last in ITEM.finditer(hidden):  # noqa: B007
        pass
    if last is None:
        lines = [line for line in text.splitlines() if line.strip()]
        return next((line for line in reversed(lines) if "\\" in line), lines[-1] if lines else None)
    line = max(hidden.rfind("\n", 0, last.start()) + 1, last.start() - 400)
    span = next((found for found in SPAN.finditer(hidden, line) if found.end() >= last.end()), last)
    start, whole = (
        min(span.start(), last.start()),
        hidden[min(span.start(), last.start()) : max(span.end(), last.end())],
    )
    before = hidden[max(0, start - 40) : start]
    if HEDGE.search(before) or ("=" not in whole and OPERATION.search(before)):
        return None
    if "=" in whole and (not re.search(r"\b(?:and|or)\b", whole) or _are_steps(whole)):
        whole = whole[whole.rindex("=") + 1 :]
    if (
        any(whole.count(opening) != whole.count(closing) for opening, closing in ("()", "[]", "{}"))
        and "\\" not in whole
    ):
        whole = last[0]
    return _show(whole, formulas).strip(" ,;:")


def _are_steps(whole: str) -> bool:
    """Whether equations that ``and`` joins lead to the last one, as ``2x = 8 and x = 4`` do: not all name a letter."""
    sides = [part.partition("=") for part in re.split(r"\band\b|,", whole)]
    return " or " not in whole and all(
        equals and not re.fullmatch(r"\s*[A-Za-z]\s*", left) for left, equals, _ in sides[:-1]
    )


def _hide(text: str) -> tuple[str, list[str]]:
    formulas: list[str] = []

    def replace(match: re.Match[str]) -> str:
        if not _is_formula(match) or len(formulas) >= 6000:
            return match[0]
        formulas.append(_content(match))
        return chr(0xE000 + len(formulas) - 1)

    return FORMULA.sub(replace, re.sub(HIDDEN, " ", text)), formulas


def _show(text: str, formulas: list[str]) -> str:
    return re.sub(HIDDEN, lambda match: f" {formulas[ord(match[0]) - 0xE000]} ", text).strip()


def _is_formula(match: re.Match[str]) -> bool:
    """Two prices in a sentence have no formula between them."""
    content = match["dollar"]
    return content is None or content.isalpha() or not WORD.search(ENVIRONMENT.sub("", TEXT.sub("", content)))


def _content(match: re.Match[str]) -> str:
    """Returns what a formula's delimiters hold; of aligned lines, the last."""
    content = next(
        match[name] for name in ("display", "bracket", "paren", "dollar", "body") if match[name] is not None
    ).strip()
    if "matrix" in content or "cases" in content or "array" in content:
        return content
    lines = [line for line in re.split(r"\\\\(?:\[[^\]]*\])?", ENVIRONMENT.sub("", content)) if line.strip()]
    return lines[-1].replace("&", "").strip().rstrip(".,") if lines else content


def first_sentence(text: str) -> str:
    """Returns the text up to the first full stop that is no decimal point. In prose a last ``!`` is no factorial."""
    end = SENTENCE_END.search(text)
    return (text[: end.start()] if end else text).rstrip()
