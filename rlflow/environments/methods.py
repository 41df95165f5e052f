"""TRL's ``environment_factory``: ``reset(**row)`` begins, public methods are tools, attributes are state."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from rlflow.environments.protocol import EnvironmentFault, Messages, Reply
from rlflow.environments.tools import ToolEnvironment
from rlflow.types import Message


class MethodsEnvironment:
    def __init__(self, made: Any) -> None:
        self._made = made
        methods = inspect.getmembers(made, inspect.ismethod)
        public = [method for name, method in methods if not name.startswith("_") and name != "reset"]
        self._calls = ToolEnvironment(public)
        self.tools = self._calls.tools

    async def reset(self, row: Mapping[str, Any]) -> Messages | None:
        """What ``reset`` returns is put behind the last user message's text, as TRL does."""
        # TRL passes the prompt under its own name.
        said = self._made.reset(**{**row, "prompt": row["messages"]})
        if inspect.isawaitable(said):
            said = await said
        if said is None:
            return None
        if not isinstance(said, str):
            raise EnvironmentFault(f"reset returned a {type(said).__name__}: return text, or None")
        messages = [dict(message) for message in row["messages"]]
        last = max(index for index, message in enumerate(messages) if message["role"] == "user")
        messages[last]["content"] += said
        return messages

    async def step(self, message: Message) -> Reply:
        reply = await self._calls.step(message)
        # Reward functions of TRL's read an attribute of this name.
        reply.done = reply.done or bool(vars(self._made).get("done", False))
        return reply

    def finish(self) -> float:
        """The attribute ``reward``, where there is one; TRL's reward functions read it."""
        reward = vars(self._made).get("reward", 0.0)
        return float(reward) if isinstance(reward, int | float) else 0.0

    @property
    def state(self) -> dict[str, Any]:
        """The public attributes that JSON can hold."""
        return {name: value for name, value in vars(self._made).items() if not name.startswith("_") and _is_json(value)}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
