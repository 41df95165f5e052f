"""What a replay changed: then and now, function by function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlflow.inspection.replay import TOLERANCE, Outcome

TOGETHER = "reward, weighted"
ADVANTAGE = "advantage"


@dataclass(frozen=True, slots=True)
class Change:
    """Counts of rollouts, and means over those that have a number."""

    name: str
    same: int
    changed: int
    failed_now: int
    failed_then: int
    mean_then: float
    mean_now: float
    is_new: bool = False
    """The files hold nothing to compare with."""
    is_gone: bool = False
    """The files hold it, and the recipe has it no more."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One number of one rollout."""

    outcome: Outcome
    name: str
    then: float
    now: float

    @property
    def size(self) -> float:
        """Infinite where one of the two is no number."""
        distance = abs(self.now - self.then)
        return math.inf if math.isnan(distance) else distance


def compare(outcomes: Sequence[Outcome]) -> list[Change]:
    """A line for each function, now or then, and for reward and advantage where there is one."""
    now = list(dict.fromkeys(name for one in outcomes for name in one.rewards))
    then = list(dict.fromkeys(name for one in outcomes for name in one.record.rewards))
    lines = [_of_function(name, outcomes, is_new=name not in then) for name in now]
    lines += [_of_gone(name, outcomes) for name in then if name not in now]
    lines.append(_line(TOGETHER, [(one.record.reward, one.reward) for one in outcomes], 0, 0))
    known = [(one.record.advantage, one.advantage) for one in outcomes if one.advantage is not None]
    if known:
        lines.append(_line(ADVANTAGE, known, 0, 0))
    return lines


def largest(outcomes: Sequence[Outcome], most: int) -> list[Difference]:
    """The numbers of functions that changed most, the largest first; at most one a rollout. Of functions that the files
    do not know, the reward of all together."""
    found = []
    for one in outcomes:
        then = one.record.rewards
        pairs = [(name, then[name], now) for name, now in one.rewards.items() if name in then]
        pairs = pairs or [(TOGETHER, one.record.reward, one.reward)]
        changed = [Difference(one, name, then, now) for name, then, now in pairs if not is_same(then, now)]
        if changed:
            found.append(max(changed, key=lambda difference: difference.size))
    return sorted(found, key=lambda difference: -difference.size)[:most]


def is_same(then: float, now: float) -> bool:
    """Whether two rewards are the same number, or both none."""
    if math.isnan(then) or math.isnan(now):
        return math.isnan(then) and math.isnan(now)
    return abs(now - then) <= TOLERANCE * max(1.0, abs(then))


def failed(name: str, error: str) -> bool:
    """Whether an account of what failed on a rollout names a function."""
    return any(cause.startswith(f"{name}: ") for cause in error.split("; "))


def _of_function(name: str, outcomes: Sequence[Outcome], *, is_new: bool) -> Change:
    failed_now = sum(failed(name, one.error) for one in outcomes)
    failed_then = sum(failed(name, one.record.error) for one in outcomes)
    pairs = [(one.record.rewards.get(name, math.nan), one.rewards[name]) for one in outcomes]
    if is_new:
        mean = _mean([now for _, now in pairs])
        return Change(name, 0, 0, failed_now, failed_then, math.nan, mean, is_new=True)
    return _line(name, pairs, failed_now, failed_then)


def _of_gone(name: str, outcomes: Sequence[Outcome]) -> Change:
    then = [one.record.rewards.get(name, math.nan) for one in outcomes]
    failed_then = sum(failed(name, one.record.error) for one in outcomes)
    return Change(name, 0, 0, 0, failed_then, _mean(then), math.nan, is_gone=True)


def _line(name: str, pairs: Sequence[tuple[float, float | None]], failed_now: int, failed_then: int) -> Change:
    numbers = [(then, math.nan if now is None else now) for then, now in pairs]
    same = sum(is_same(then, now) for then, now in numbers)
    means = _mean([then for then, _ in numbers]), _mean([now for _, now in numbers])
    return Change(name, same, len(numbers) - same, failed_now, failed_then, *means)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
