"""What an engine's thread keeps of the groups that it generates, and what it counts."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from rlflow.types import Completion, GroupRequest

if TYPE_CHECKING:
    from rlflow.actors.environment_episodes import PlayedEpisode

RunningAtUpdate = Literal["continue", "restart", "wait"]
"""What becomes of completions under way when weights come: they go on with the new ones, they are begun anew, or the
weights wait until they have ended, and nothing new is begun meanwhile."""


@dataclass(slots=True)
class EngineGroup:
    """A group under way, or done."""

    request: GroupRequest
    completions: list[Completion | PlayedEpisode | None]
    """In the order of the request's seeds; None of those that have not ended."""
    samples: list[int]
    """The engine's id of each."""

    @property
    def is_done(self) -> bool:
        return all(completion is not None for completion in self.completions)

    @property
    def unfinished(self) -> list[int]:
        """The engine's ids of those that have not ended."""
        return [id for id, done in zip(self.samples, self.completions, strict=True) if done is None]


@dataclass(frozen=True, slots=True)
class WaitingUpdate:
    """Weights that wait until what is under way has ended: the newest of them."""

    version: int
    load: Callable[[], None]
    futures: list[Future[None]]
    """Of these, and of older ones that wait no more."""


@dataclass(slots=True)
class EngineCounts:
    """What the thread has done since it began."""

    steps: int = 0
    replies: int = 0
    """Of environments, behind which a completion was asked for."""
    samples: int = 0
    """That it has taken."""
    tokens: int = 0
    """Of completions that have ended."""
    busy_s: float = 0.0
    """In steps of the engine."""
    loads: int = 0
    load_s: float = 0.0
    """In which weights were loaded, and nothing was generated."""
    reread_tokens: int = 0
    """Of completions under way, read again with new weights."""
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    """(what it did, from, until), in seconds since 1970; those since they were last taken."""
