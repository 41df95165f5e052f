"""Where a text states its final answer. Plain string work: no sympy, so that format rewards stay cheap."""

from __future__ import annotations

import re
from typing import NamedTuple

BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
"""Braces, and escapes to step over."""
HASHES = re.compile(r"####[ \t]*\**(?!\d+[.)][ \t]+\**[A-Za-z]{2})(?=(?P<answer>(?:[^\sA-Za-z#*]|[A-Za-z]\b)[^\n]*))")
"""No Markdown heading: ``#### Step 2`` and ``#### 2. Divide`` state no answer."""
ANSWER_IS = re.compile(
    r"(?:\banswer\b[^\n.:=]{0,60}?(?:\bis\b|:|=)\**:?|^\**A:)\s*(?:\*+\s*)?(?=(?P<answer>\S[^\n]*))",
    re.IGNORECASE | re.MULTILINE,
)
ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
CALCULATOR_NOTE = re.compile(r"<<[^<>\n]*>>")
SENTENCE_END = re.compile(r"\.(?:\s|$)")


class Boxed(NamedTuple):
    start: int
    """Where ``\\boxed`` begins."""
    content: str
    """What its braces hold."""


def last_boxed(text: str) -> Boxed | None:
    """Returns the last ``\\boxed{...}`` or ``\\fbox{...}`` whose braces balance, or None. Linear in the text."""
    boxes = {match.end() - 1: match.start() for match in BOXED.finditer(text)}
    found: Boxed | None = None
    unclosed: list[int] = []
    for match in BRACE.finditer(text):
        if match[0] == "{":
            unclosed.append(match.start())
        elif match[0] == "}" and unclosed:
            start = boxes.get(opening := unclosed.pop())
            if start is not None and (found is None or start > found.start):
                found = Boxed(start, text[opening + 1 : match.start()])
    return found


def final_answer(text: str, *, explicit: bool = False) -> str | None:
    r"""Finds the last answer that a text states.

    A chain of thought up to ``</think>`` is left out; where there are ``<answer>`` tags only the last one counts. Then
    the last ``\boxed{x}`` or ``#### x`` wins; without one, the last ``the answer is x``, ``Answer: x`` or ``A: x``;
    without that, the last line that holds a digit or LaTeX, or the last line.

    Args:
        text: A completion, or a reference solution.
        explicit: Take only a stated answer, never the last line.

    Returns:
        The answer without markdown, math delimiters and full stop; None when there is none.
    """
    text = CALCULATOR_NOTE.sub("", text.rpartition("</think>")[2])
    if tags := ANSWER_TAG.findall(text):
        text, explicit = tags[-1], False
    marked: list[tuple[int, str]] = []
    if boxed := last_boxed(text):
        marked.append((boxed.start, boxed.content))
    if hashes := list(HASHES.finditer(text)):
        marked.append((hashes[-1].start(), hashes[-1]["answer"]))
    if marked:
        return bare(max(marked)[1]) or None
    if stated := list(ANSWER_IS.finditer(text)):
        return bare(first_sentence(stated[-1]["answer"])) or None
    lines = [line for line in text.splitlines() if line.strip()]
    if explicit or not lines:
        return None
    return bare(next((line for line in reversed(lines) if re.search(r"[\d\\$]", line)), lines[-1])) or None


def first_sentence(text: str) -> str:
    """Returns the text up to the first full stop that is no decimal point. In prose a last ``!`` is no factorial."""
    end = SENTENCE_END.search(text)
    return (text[: end.start()] if end else text).rstrip().rstrip("!")


def bare(answer: str) -> str:
    r"""Strips spaces, markdown emphasis, math delimiters, a currency sign and closing punctuation."""
    answer = answer.strip().strip("*`#").rstrip(".,;:").strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = answer[len(opening) : -len(closing)]
        if len(answer) > len(opening + closing) and answer == opening + inner + closing and opening not in inner:
            return bare(inner)
    return re.sub(r"^\\?[$€£¥]\s*(?=[-\d.])", "", answer)
