"""Text as long as GSM8K's, where there is no GSM8K."""

from __future__ import annotations

import random
from collections.abc import Iterator

WORDS = ("Anna", "bought", "sold", "apples", "tickets", "every", "morning", "while", "brother", "saved", "half", "last")


def word_problems(rows: int) -> Iterator[dict[str, str]]:
    """{question, answer}, always the same ones.

    The logarithms of their numbers of words have the mean and the standard deviation of GSM8K's train split.
    """
    draw = random.Random(0)
    for _ in range(rows):
        length = round(draw.lognormvariate(3.74, 0.37))
        question = [draw.choice((*WORDS, *(str(draw.randint(2, 99)) for _ in range(3)))) for _ in range(length)]
        length = round(draw.lognormvariate(3.81, 0.54))
        answer: list[str] = []
        while len(answer) < length:
            a, b = draw.randint(2, 99), draw.randint(2, 99)
            answer += [
                *draw.choices(WORDS, k=10),
                f"{a}+{b}",
                "=",
                f"<<{a}+{b}={a + b}>>{a + b}",
                *draw.choices(WORDS, k=2),
            ]
        yield {
            "question": f"{' '.join(question)}?",
            "answer": f"{' '.join(answer[:length])}\n#### {draw.randint(2, 999)}",
        }
