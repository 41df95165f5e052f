"""One thing that was looked at, and what to do where it is not as it should be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """A line of what was found."""

    name: str
    level: Literal["ok", "warn", "fail"]
    """warn: some runs will be slower or refused; fail: none will work."""
    detail: str
    remedy: str = ""
    """Empty where all is well."""


Check = Callable[[], Iterable[Finding]]


def ok(name: str, detail: str) -> Finding:
    return Finding(name, "ok", detail)


def warn(name: str, detail: str, remedy: str) -> Finding:
    return Finding(name, "warn", detail, remedy)


def fail(name: str, detail: str, remedy: str) -> Finding:
    return Finding(name, "fail", detail, remedy)
