"""Is the completion the reference, to the letter?"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from rlflow.rewards.ground_truth import ground_truth


def exact_match(
    prompts: Sequence[Any],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    solution: Sequence[Any],
    **columns: Any,
) -> list[float | None]:
    """1 where completion and reference are equal without surrounding white space, 0 elsewhere, None without reference.

    Args:
        solution: References, or mappings with a ``ground_truth``. One that is a number and no text is compared by how
            it prints, a float also without its fraction where that is 0, and without its exponent: 7.0 is ``7``.
    """
    references = [ground_truth(gold) for gold in solution]
    return [
        None if reference is None else float(completion.strip() in spellings(reference))
        for completion, reference in zip(completions, references, strict=True)
    ]


def spellings(reference: Any) -> set[str]:
    """Returns the texts that are a reference."""
    texts = {str(reference).strip()}
    if isinstance(reference, float) and abs(reference) < float("inf"):
        plain = format(Decimal(repr(reference)), "f")
        texts |= {plain, plain.removesuffix(".0")}
    return texts
