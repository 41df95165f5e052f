"""Whether math-verify can parse formulas: ``python -m rlflow.rewards.reference_child``, a process that may be killed.

Reads a JSON list of formulas from standard input, and writes ``1`` or ``0`` for each, a line as soon as it is known.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rlflow.rewards.mathematics.symbolic import is_enormous, parsed

TIMEOUT_S = 2


def main(formulas: Sequence[str]) -> None:
    for formula in formulas:
        print(int(can_be_parsed(formula)), flush=True)


def can_be_parsed(formula: str) -> bool:
    try:
        expressions = parsed(formula, TIMEOUT_S)
    except TimeoutError:
        return False
    return bool(expressions) and not any(is_enormous(expression) for expression in expressions)


if __name__ == "__main__":
    main(json.load(sys.stdin))
