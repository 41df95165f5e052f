"""Right and wrong answers to the quickstart's additions: pairs of them, or one with its judgement."""

from __future__ import annotations

import random
from typing import Any

from rlflow.data.generated import arithmetic


def pairs(split: str = "train", rows: int | None = None) -> list[dict[str, Any]]:
    """{prompt, chosen, rejected}: the sum, and a number near it."""
    made = []
    for row in arithmetic(split=split, rows=rows):  # pyright: ignore[reportArgumentType]
        # From a name and not from a shared generator: a row does not depend on those before it.
        off = random.Random(row["prompt"]).choice((-20, -10, -2, -1, 1, 2, 10, 20))
        made.append(
            {"prompt": row["prompt"], "chosen": row["solution"], "rejected": str(abs(int(row["solution"]) + off))}
        )
    return [row for row in made if row["chosen"] != row["rejected"]]


def judged(split: str = "train", rows: int | None = None) -> list[dict[str, Any]]:
    """{prompt, completion, label}: every third answer right."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 3 == 0 else "rejected"], "label": i % 3 == 0}
        for i, row in enumerate(pairs(split, rows))
    ]
