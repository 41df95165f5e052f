"""Where a text states its final answer. Plain string work: no sympy, so that format rewards stay cheap.

Every search is linear in the text, whatever a policy wrote: markers are looked for from the start or from the end, and
what is looked at closely is the last `TAIL` characters.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from rlflow.rewards.mathematics.notation import TEXT
from rlflow.rewards.statements import answer_of_sentence, answer_of_solution, is_bare

BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
"""Braces, and escapes to step over."""
HASHES = re.compile(r"####[ \t]*\**(?!\d+[.)][ \t]+\**[A-Za-z]{2})(?=[^\sA-Za-z#*]|[A-Za-z]\b)")
"""No Markdown heading: ``#### Step 2`` and ``#### 2. Divide`` state no answer."""
ANSWER_IS = re.compile(
    r"(?:\b(?:(?<!to )answer(?! (?:the|this|these|your|choices|options)\b)|(?:correct|right|best) (?:option|choice)"
    r"|respuesta|réponse|antwort|risposta|resposta|ответ)\b"
    r"[^\n.:=。]{0,60}?"
    r"(?:\b(?:is|are|was|be|es|est|ist|lautet|è|é)\b|\bis(?=n[o']?t)|:|=|\u2014)\**:?|答案(?:是|为|為|\uff1a|:)|答えは|정?답은|^\**A:|(?<=\s)A:(?=[^\n]{1,40}$))\s*(?:\*+\s*)?(?=\S)",
    re.IGNORECASE | re.MULTILINE,
)
CALCULATOR_NOTE = re.compile(r"<<[^<>\n]*>>")
THOUGHT_OPENED = re.compile(r"<(?:think|thinking|thought|reasoning|seed:think)>|\[THINK\]")
THOUGHT_CLOSED = re.compile(r"</(?:think|thinking|thought|reasoning|seed:think)>|\[/THINK\]")
JOINED = re.compile(r"(?<![A-Za-z])(?:and|or)(?![A-Za-z])|[,;&]")
MOVED_ON = re.compile(
    r"\b(?:no|not|wait|actually|correction|mistake|instead|rather|so|therefore|thus|hence|then|final|finally|answer|check|step|"
    r"now|next|but|however|gives?|yields?|total)\b|=>|\\implies|\\Rightarrow|→|\n\s*\n",
    re.IGNORECASE,
)
"""Between two boxes it says that the second is no further answer, but the answer."""
LEADING_SIGN = re.compile(r"^(?:(?:\.{3}\s*)?=|\\approx(?![A-Za-z])|≈)\s*")
QUOTED = re.compile(r"^\s*>\s+", re.MULTILINE)
TAIL = 2000
MAX_BETWEEN_BOXES = 70


class Boxed(NamedTuple):
    start: int
    """Where ``\\boxed`` begins."""
    content: str
    """What its braces hold."""
    end: int
    """Behind its closing brace."""


def boxes(text: str) -> list[Boxed]:
    """Returns every ``\\boxed{...}`` and ``\\fbox{...}`` whose braces balance and that holds no other, in order."""
    starts = {match.end() - 1: match.start() for match in BOXED.finditer(text)}
    found: list[Boxed] = []
    unclosed: list[int] = []
    for match in BRACE.finditer(text) if starts else ():
        if match[0] == "{":
            unclosed.append(match.start())
        elif match[0] == "}" and unclosed:
            start = starts.get(opening := unclosed.pop())
            if start is not None and (not found or found[-1].start < start):
                found.append(Boxed(start, text[opening + 1 : match.start()], match.end()))
    return found


def last_boxed(text: str) -> Boxed | None:
    """Returns the last ``\\boxed{...}`` or ``\\fbox{...}`` whose braces balance, or None. Linear in the text."""
    found = boxes(text)
    return max(found) if found else None


def final_answer(text: str, *, explicit: bool = False) -> str | None:
    r"""Finds the answer that a completion ends in.

    1. Up to ``</think>`` nothing counts; a ``<think>`` that is never closed leaves no answer. Where there are
       ``<answer>`` tags only the last one counts.
    2. The last ``\boxed{x}`` or ``#### x``. Boxes that one sentence joins (``\boxed{4} and \boxed{6}``) are one answer
       of several parts; a box behind a correction or a further step stands alone.
    3. Without one, the last ``the answer is x``, ``Answer: x`` or ``A: x``.
    4. Without that, the last formula or number of the last line that has one, or a line of words.

    Args:
        text: A completion.
        explicit: Take only a stated answer, never what the text happens to end in.

    Returns:
        The whole of the answer without markdown, math delimiters and full stop; None when there is none.
    """
    visible = without_thoughts(text)
    return None if visible is None else _answer(*_in_tags(visible, explicit), whole=False)


def reference_answer(text: str) -> str | None:
    """Finds the answer of a reference: as `final_answer`, but all of its boxes count, and a line without a marker is
    the answer as it stands."""
    return _answer(*_in_tags(text, False), whole=True)


def without_thoughts(text: str) -> str | None:
    """Returns what follows the last closed thought; None where a thought is not closed."""
    closed = _last(THOUGHT_CLOSED, text)
    rest = text[closed.end() :] if closed else text
    return None if THOUGHT_OPENED.search(rest) else rest


def _in_tags(text: str, explicit: bool) -> tuple[str, bool]:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return (text[start + len("<answer>") : end], False) if start >= 0 else (text, explicit)


def _answer(text: str, explicit: bool, *, whole: bool) -> str | None:
    if "<<" in text:
        text = CALCULATOR_NOTE.sub("", text)
    boxed = boxes(text) if "boxed" in text or "fbox" in text else []
    hashes = _last(HASHES, text) if "####" in text else None
    if hashes is not None and (not boxed or hashes.start() > boxed[-1].start):
        return bare(_line(text, hashes.end())) or None
    if boxed:
        return _joined(boxed if whole else _last_group(boxed, text))
    stated = _last(ANSWER_IS, text)
    if stated is not None:
        return _stated(text, stated)
    if explicit:
        return None
    if whole and "\n" not in text.strip() and len(text) <= TAIL:
        return bare(text) or None
    tail = QUOTED.sub("", text[-TAIL:]).strip()
    lines = [line for line in tail.splitlines() if line.strip()]
    if len(lines) == 1 and is_bare(lines[0]):
        return bare(lines[0]) or None
    answer = answer_of_solution(tail)
    return None if answer is None else bare(answer) or None


def _stated(text: str, match: re.Match[str]) -> str | None:
    negated = re.search(
        r"(?:not|n't|never|cannot)\b[\s\w]{0,20}$",
        match[0][:-1] if match[0].endswith(":") else match[0].rstrip(),
        re.IGNORECASE,
    )
    rest = text[match.end() : match.end() + TAIL]
    answer = answer_of_sentence(rest, negated=negated is not None)
    return None if answer is None else bare(answer) or None


def _joined(group: list[Boxed]) -> str | None:
    contents = [_in_box(box.content) for box in group]
    return ", ".join(dict.fromkeys(content for content in contents if content)) or None


def _in_box(content: str) -> str | None:
    said = TEXT.sub(r"\1", content) if "answer" in content else content
    stated = _last(ANSWER_IS, said)
    return bare(content) if stated is None else _stated(said, stated)


def _last_group(found: list[Boxed], text: str) -> list[Boxed]:
    first = len(found) - 1
    while first > 0:
        between = text[found[first - 1].end : found[first].start]
        near = len(between) < 10 or (len(between) <= MAX_BETWEEN_BOXES and JOINED.search(between) is not None)
        if not near or MOVED_ON.search(between):
            break
        first -= 1
    return found[first:]


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    last = None
    for last in pattern.finditer(text):  # noqa: B007
        pass
    return last


def _line(text: str, start: int) -> str:
    end = text.find("\n", start)
    return text[start : len(text) if end < 0 else end]


def bare(answer: str) -> str:
    r"""Strips spaces, markdown emphasis, math delimiters, quotes and closing punctuation."""
    answer = LEADING_SIGN.sub("", answer.strip().strip("*`#_").rstrip(",;:").strip())
    answer = answer[:-1].rstrip() if answer.endswith(".") and not answer.endswith("..") else answer
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ('"', '"'), ("'", "'")):
        inner = answer[len(opening) : -len(closing)]
        if len(answer) > len(opening + closing) and answer == opening + inner + closing and opening not in inner:
            return bare(inner)
    return answer
