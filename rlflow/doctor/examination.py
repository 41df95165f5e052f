"""All checks side by side, within a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from queue import Empty, SimpleQueue

from rlflow.doctor import hardware, packages, surroundings
from rlflow.doctor.finding import Check, Finding, warn

DEADLINE_S = 2.5
CHECKS: tuple[Check, ...] = (*packages.CHECKS, *hardware.CHECKS, *surroundings.CHECKS)


def examine(checks: Sequence[Check] = CHECKS, deadline_s: float = DEADLINE_S) -> list[Finding]:
    """What the checks found, in their order. One that has not ended by the deadline is a warning."""
    answers: SimpleQueue[tuple[int, list[Finding]]] = SimpleQueue()
    for index, check in enumerate(checks):
        # Daemons: a disk or a name server that hangs does not keep the process.
        threading.Thread(target=_answer, args=(answers, index, check), daemon=True).start()
    found: dict[int, list[Finding]] = {}
    ends = time.monotonic() + deadline_s
    while len(found) < len(checks):
        try:
            index, findings = answers.get(timeout=max(0.0, ends - time.monotonic()))
        except Empty:
            break
        found[index] = findings
    for index, check in enumerate(checks):
        if index not in found:
            name = _name(check)
            found[index] = [warn(name, f"no answer within {deadline_s:g} s", "a disk, a driver or a name server hangs")]
    return [finding for index in range(len(checks)) for finding in found[index]]


def _answer(answers: SimpleQueue[tuple[int, list[Finding]]], index: int, check: Check) -> None:
    try:
        findings = list(check())
    except Exception as error:  # of a machine that is not as the check expects: the other checks still say theirs
        findings = [
            warn(_name(check), f"could not be looked at: {type(error).__name__}: {error}", "please report this")
        ]
    answers.put((index, findings))


def _name(check: Check) -> str:
    return getattr(check, "__name__", "check").removeprefix("check_")
