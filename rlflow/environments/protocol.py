"""What an environment does: it begins an episode with a row of the data, and answers the policy until it is over.

One instance serves one episode, in a process of its own that may be killed. Methods may be coroutines.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlflow.types import Message

Messages = Sequence[Message] | str
"""Several messages, or the text of a user's."""


@dataclass(slots=True)
class Reply:
    """What an environment says to a message of the policy."""

    messages: Messages = ()
    """What the policy hears; not used when the episode is over."""
    reward: float = 0.0
    """Of this step; an episode's is the sum."""
    done: bool = False
    """Whether the episode is over."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """What is to be counted, by name: the metric ``environment/<name>`` is the mean over episodes of its sum."""


class Environment(Protocol):
    """A class of such is what a recipe names, as ``environment: {plugin: file.py:Class, args: {...}}``.

    It may have, beside these, ``tools``: functions with type hints and docstrings, or JSON schemas, that are described
    to the policy, whose calls are then in ``message["tool_calls"]``; ``state``: what is kept of it at the end, which
    reward functions see; ``finish()``: called at the end, whatever it was, and may return a last reward.
    """

    def reset(self, row: Mapping[str, Any]) -> Messages | Awaitable[Messages | None] | None:
        """Begins an episode.

        Args:
            row: The columns of a row of the data, and its prompt as ``messages``.

        Returns:
            What the conversation begins with; None where the row's messages stand as they are.
        """
        ...

    def step(self, message: Message) -> Reply | Messages | Awaitable[Reply | Messages | None] | None:
        """Answers what the policy said: ``{"role": "assistant", "content": text}``.

        Returns:
            A reply; or only what the policy hears, and the episode goes on; or None, and it is over.
        """
        ...


class EnvironmentFault(ValueError):
    """An environment of the recipe cannot be found, loaded or described, or did what no environment may."""


def told(error: BaseException) -> str:
    """The kind of an error and its words, which may be none, or raise themselves."""
    try:
        words = str(error)
    # The user's code.
    except BaseException as another:
        words = f"(its text raised {type(another).__name__})"
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
