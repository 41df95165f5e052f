"""OpenEnv: an environment behind a server, by OpenEnv's generic client.

    environment: {name: openenv, args: {url: "http://localhost:8000", action: message, observation: echoed_message}}

The policy's text is the field ``action`` of an action; what it hears is the field ``observation`` of an observation, or
all of it as JSON. An action of several fields is JSON that the policy writes: leave ``action`` out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from rlflow.environments.protocol import EnvironmentFault, Reply
from rlflow.types import Message


class OpenEnvEnvironment:
    def __init__(
        self,
        url: str,
        action: str | None = None,
        observation: str | None = None,
        begins: bool = True,
        timeout_s: float = 30.0,
    ) -> None:
        """
        Args:
            begins: Whether the first observation is put behind the row's messages.
            timeout_s: Of a message of the server.
        """
        try:
            client = import_module("openenv.core.generic_client").GenericEnvClient
        except ImportError as error:
            reason = f"this environment needs openenv-core ({error}): pip install openenv-core"
            raise EnvironmentFault(reason) from error

        self._client: Any = client(base_url=url, message_timeout_s=timeout_s)
        self._action, self._observation, self._begins = action, observation, begins

    async def reset(self, row: Mapping[str, Any]) -> list[Message] | None:
        result = await self._client.reset()
        said = self._said(result.observation)
        if not self._begins or not said:
            return None
        return [*row["messages"], {"role": "user", "content": said}]

    async def step(self, message: Message) -> Reply:
        text = message["content"]
        if self._action is not None:
            action: Any = {self._action: text}
        else:
            try:
                action = json.loads(text)
            except ValueError as error:
                return Reply(f"This is no JSON: {error}", counts={"unread_actions": 1})
            if not isinstance(action, dict):
                return Reply("An action is a JSON object.", counts={"unread_actions": 1})
        result = await self._client.step(action)
        reward = 0.0 if result.reward is None else float(result.reward)
        return Reply(self._said(result.observation) or "(nothing)", reward=reward, done=bool(result.done))

    async def finish(self) -> None:
        """Ends the session; the server may serve another then."""
        self._state = dict(await self._client.state())
        await self._client.close()

    def state(self) -> dict[str, Any]:
        return self._state

    def _said(self, observation: Any) -> str:
        fields = observation if isinstance(observation, dict) else dict(vars(observation))
        if self._observation is not None:
            return str(fields.get(self._observation, ""))
        return json.dumps(fields, ensure_ascii=False, default=str)
