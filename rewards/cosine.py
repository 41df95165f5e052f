"""Accuracy that prefers short right answers and long wrong ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rlflow.rewards.math_accuracy import math_accuracy


def cosine(
    prompts: Sequence[Any],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    solution: Sequence[Any],
    *,
    max_tokens: int,
    correct_short: float = 1.0,
    correct_long: float = 0.5,
    wrong_short: float = -1.0,
    wrong_long: float = -0.5,
    exceeded: float | None = None,
    clamp: bool = True,
    **columns: Any,
) -> list[float | None]:
    """Cosine reward of arXiv 2502.03373, eq. 1 and appendix C.1; None where the reference is no mathematics.

    ``r = r_L + (r_0 - r_L) * (1 + cos(pi * |y| / L_max)) / 2`` with ``(r_0, r_L)`` = (short, long) of a right or a
    wrong answer, as `math_accuracy` judges it. Without ``exceeded`` and with ``clamp`` this is TRL's; ms-swift does
    not clamp, so that its reward rises again past L_max. The paper's own values are 2, 1, -10, 0, exceeded -10.

    Args:
        solution: References, see `math_accuracy`.
        max_tokens: L_max, as a rule the recipe's ``rollout.max_new_tokens``.
        correct_short: r_0 of a right answer of no length.
        correct_long: r_L of a right answer of L_max tokens.
        wrong_short: r_0 of a wrong answer.
        wrong_long: r_L of a wrong answer.
        exceeded: The paper's r_e, for any completion of L_max tokens or more; None goes on with the formula.
        clamp: Take a completion longer than L_max as one of L_max.

    Raises:
        TimeoutError: See `math_accuracy`.
    """
    rewards: list[float | None] = []
    correct = math_accuracy(prompts, completions, completion_ids, solution)
    for is_correct, ids in zip(correct, completion_ids, strict=True):
        if is_correct is None:
            rewards.append(None)
        elif exceeded is not None and len(ids) >= max_tokens:
            rewards.append(exceeded)
        else:
            short, long = (correct_short, correct_long) if is_correct else (wrong_short, wrong_long)
            progress = len(ids) / max_tokens
            angle = math.pi * (min(progress, 1.0) if clamp else progress)
            rewards.append(long + (short - long) * (1.0 + math.cos(angle)) / 2.0)
    return rewards
