"""What every actor of a run did, and when: a file a step, for Perfetto (ui.perfetto.dev) and chrome://tracing."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rlflow.checkpoint import naming_the_disk

WAIT = "wait"
"""The span of an actor that has nothing to do."""


class Span(NamedTuple):
    """Something that took time. Seconds since 1970."""

    actor: str
    """``trainer[0]``, ``rollout[1]``, or ``driver``."""
    name: str
    began: float
    ended: float


class Trace:
    """Gathers spans from several threads."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    def add(self, actor: str, name: str, began: float, ended: float) -> None:
        with self._lock:
            self._spans.append(Span(actor, name, began, ended))

    def take(self) -> list[Span]:
        """Those that were added since the last call."""
        with self._lock:
            spans, self._spans = self._spans, []
        return spans


def busy_metrics(spans: Sequence[Span], began: float, ended: float) -> dict[str, float]:
    """``busy/<role>``: the share of the time from ``began`` to ``ended`` in which a role's actors had something to do,
    their mean. What overlaps counts once."""
    of_actor: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for span in spans:
        if span.actor != "driver":
            ended_busy = span.began if span.name == WAIT else span.ended
            of_actor[span.actor].append((max(span.began, began), min(ended_busy, ended)))
    of_role: dict[str, list[float]] = defaultdict(list)
    for actor, times in of_actor.items():
        of_role[actor.partition("[")[0]].append(_covered(times) / max(1e-9, ended - began))
    return {f"busy/{role}": sum(shares) / len(shares) for role, shares in of_role.items()}


def write_trace(path: Path, spans: Sequence[Span]) -> None:
    """Writes the Trace Event Format's JSON object: a complete event a span, an actor a thread, microseconds.

    Raises:
        DiskError: Writing failed.
    """
    actors = sorted({span.actor for span in spans}, key=lambda actor: (actor != "driver", actor))
    thread_of = {actor: number for number, actor in enumerate(actors)}
    names = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": actor}}
        for actor, number in thread_of.items()
    ]
    events = [
        {
            "ph": "X",
            "name": span.name,
            "pid": 0,
            "tid": thread_of[span.actor],
            "ts": round(span.began * 1e6),
            "dur": round((span.ended - span.began) * 1e6),
        }
        for span in sorted(spans, key=lambda span: span.began)
    ]
    text = json.dumps({"traceEvents": [*names, *events], "displayTimeUnit": "ms"})
    with naming_the_disk(path, len(text)):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _covered(times: Sequence[tuple[float, float]]) -> float:
    """Seconds that lie in any of the intervals."""
    total, reached = 0.0, float("-inf")
    for began, ended in sorted(times):
        total += max(0.0, ended - max(began, reached))
        reached = max(reached, ended)
    return total
