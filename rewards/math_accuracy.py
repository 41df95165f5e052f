"""Is the final answer mathematically equal to the reference?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlflow.rewards.answers import final_answer, reference_answer
from rlflow.rewards.ground_truth import ground_truth
from rlflow.rewards.mathematics.equality import are_equal
from rlflow.rewards.mathematics.notation import clean
from rlflow.rewards.mathematics.reader import MAX_ANSWER_CHARACTERS, read
from rlflow.rewards.mathematics.symbolic import verdict


def math_accuracy(
    prompts: Sequence[Any],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    solution: Sequence[Any],
    *,
    explicit: bool = False,
    timeout_s: int = 2,
    **columns: Any,
) -> list[float | None]:
    r"""1 where the final answer equals the reference, 0 where it does not, None where there is no reference.

    What counts as a final answer is in `rlflow.rewards.answers.final_answer`, what it says in
    `rlflow.rewards.mathematics`. Must run on the main thread of its process, which math-verify needs for its clock.

    Args:
        solution: References: a bare answer (``\frac{1}{3}``, ``1,234``), a worked solution that ends in ``#### 42`` or
            ``\boxed{42}``, or a mapping with such a ``ground_truth``.
        explicit: Accept only a stated answer, never the last number of the completion.
        timeout_s: Whole seconds that parsing or comparing one answer may take.

    Raises:
        TimeoutError: No verdict in that time. It is an error and not a 0: the answer may be right.
        TypeError, ValueError: ``timeout_s`` is no whole number, or under 1.
    """
    if not isinstance(timeout_s, int):
        raise TypeError(f"timeout_s {timeout_s!r} is no whole number of seconds")
    if timeout_s < 1:
        raise ValueError(f"timeout_s {timeout_s} must be at least 1")
    rewards: list[float | None] = []
    for completion, gold in zip(completions, solution, strict=True):
        reference = reference_text(gold)
        if reference is None:
            rewards.append(None)
        else:
            answer = final_answer(completion, explicit=explicit)
            rewards.append(0.0 if answer is None else float(is_equal(answer, reference, timeout_s)))
    return rewards


def reference_text(gold: Any) -> str | None:
    """Returns the answer that a reference of the data states; None where it states none."""
    truth = ground_truth(gold)
    return None if truth is None else reference_answer(str(truth))


def is_equal(answer: str, reference: str, timeout_s: int) -> bool:
    """Whether two isolated answers are one.

    Raises:
        TimeoutError: See `math_accuracy`.
    """
    if answer == reference:
        return True
    if max(len(answer), len(reference)) > MAX_ANSWER_CHARACTERS:
        return False
    said, wanted = read(answer), read(reference)
    if clean(answer).split() == clean(reference).split():
        return True
    return are_equal(said, wanted, lambda: verdict(answer, reference, timeout_s))
