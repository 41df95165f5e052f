"""TRL's ``environment_factory``: ``reset(**row)`` begins, public methods are tools, attributes are state, and
``get_reward()`` or the attribute ``reward`` is what the episode is worth."""

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
        # Of the class: of an instance, properties would be evaluated, and methods of what it holds be tools.
        names = [name for name, _ in inspect.getmembers(type(made), inspect.isroutine)]
        public = [name for name in names if not name.startswith("_") and name not in ("reset", "get_reward")]
        if not public:
            raise EnvironmentFault(
                "it has reset, and neither step(message) nor public methods that would be tools: see "
                "docs/environments.md"
            )
        self._calls = ToolEnvironment([getattr(made, name) for name in public])
        self.tools = self._calls.tools

    @property
    def columns(self) -> list[str]:
        """What ``reset`` needs by name, the prompt aside."""
        parameters = inspect.signature(self._made.reset).parameters.values()
        named = [each for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
        return [each.name for each in named if each.default is each.empty and each.name not in ("prompt", "messages")]

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

    async def finish(self) -> Any:
        """What ``get_reward`` returns; or the attribute ``reward``, where there is one, which TRL's reward functions
        read."""
        if callable(get_reward := getattr(self._made, "get_reward", None)):
            reward = get_reward()
            return await reward if inspect.isawaitable(reward) else reward
        reward = getattr(self._made, "reward", None)
        return 0.0 if callable(reward) else reward

    @property
    def state(self) -> dict[str, Any]:
        """The public attributes that JSON can hold, or could if numpy's values were Python's."""
        return {name: value for name, value in vars(self._made).items() if not name.startswith("_") and _is_json(value)}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, default=lambda one: one.tolist())
    except (TypeError, ValueError, AttributeError):
        return False
    return True
