"""Is the completion the reference, to the letter?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def exact_match(
    prompts: Sequence[Any],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    solution: Sequence[Any],
    **columns: Any,
) -> list[float | None]:
    """1 where completion and reference are equal without surrounding white space, 0 elsewhere, None without reference.

    Args:
        solution: References; numbers are compared by how they print.
    """
    return [
        None if gold is None else float(completion.strip() == str(gold).strip())
        for completion, gold in zip(completions, solution, strict=True)
    ]
