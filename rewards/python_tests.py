"""Does the program pass its tests? It runs in rlflow.rewards.sandbox."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rlflow.rewards.answers import without_thoughts
from rlflow.rewards.resolving import RewardError
from rlflow.rewards.sandbox import Limits, require_isolation, run_python

_FENCE = re.compile(
    r"^[ \t]*```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE | re.IGNORECASE
)
_ENDS = re.compile(r"\n(?=class |def |#|if |print\(|@|assert )")
"""Where what goes on from a function's head leaves the function (arXiv 2107.03374, section 2.1)."""


class PythonTests:
    """1 where the program of a completion passes its tests, 0 where it does not, None where there are none."""

    def __init__(
        self,
        *,
        timeout_s: float = 10.0,
        memory_gib: float = 1.0,
        unsafe: bool = False,
    ) -> None:
        """
        Args:
            timeout_s: Seconds that one program may take.
            memory_gib: Memory that it may take.
            unsafe: Run it without isolation: it can do whatever this user can.

        Raises:
            RewardError: Programs cannot be isolated here, or a limit is none.
        """
        if timeout_s <= 0 or memory_gib <= 0:
            raise RewardError("python_tests: timeout_s and memory_gib must be above 0")
        self._limits, self._unsafe = Limits(timeout_s=timeout_s, memory_gib=memory_gib), unsafe
        if not unsafe:
            require_isolation()

    def __call__(
        self,
        completions: Sequence[str],
        test: Sequence[str | None],
        entry_point: Sequence[str | None] | None = None,
        code: Sequence[str | None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """
        Args:
            test: Python: asserts, or a function ``check(candidate)`` as HumanEval has it.
            entry_point: Of the function that ``check`` is called with.
            code: What comes before the completion: imports, and a function's head where the completion goes on from it.
        """
        heads = code or [None] * len(completions)
        names = entry_point or [None] * len(completions)
        rewards: list[float | None] = []
        for completion, tests, name, head in zip(completions, test, names, heads, strict=True):
            if tests is None:
                rewards.append(None)
                continue
            program = program_of(completion, head or "", name)
            call = f"\n\ncheck({name})\n" if name and "def check(" in tests else "\n"
            outcome = run_python(f"{program}\n\n{tests}{call}", self._limits, unsafe=self._unsafe)
            rewards.append(float(outcome.passed))
        return rewards


def program_of(completion: str, head: str = "", name: str | None = None) -> str:
    """The program that a completion holds: its last fenced block that defines the function, all of it, or what goes on
    from the head up to where that function ends.

    Args:
        head: What the model was given of the program.
        name: Of the function that is wanted.
    """
    answer = without_thoughts(completion)
    if answer is None:
        return "raise AssertionError('the thought has no end')"
    blocks = _FENCE.findall(answer)
    defining = [block for block in blocks if _defines(block, name)]
    text = (defining or blocks or [answer])[-1]
    if _defines(text, name):
        return f"{_before_function(head)}\n{text}" if head else text
    return head + (text if blocks else _ENDS.split(text, maxsplit=1)[0])


def _defines(text: str, name: str | None) -> bool:
    """Whether a program has the function; any has none."""
    return (
        name is None
        or re.search(rf"^[ \t]*(?:async[ \t]+)?def[ \t]+{re.escape(name)}\b", text, re.MULTILINE) is not None
    )


def _before_function(head: str) -> str:
    """The imports and helpers of a head, without the function that it leaves open."""
    return head[: head.rfind("\ndef ") + 1] if "\ndef " in head else "" if head.startswith("def ") else head
