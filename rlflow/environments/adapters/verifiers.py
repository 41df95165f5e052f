"""verifiers: environments of its classic interface (``load_environment``, ``MultiTurnEnv``), versions 0.1; of its
later ones, which have another, `verifiers_tasks` takes care.

    environment: {name: verifiers, args: {id: wordle}}
    data: {train: {generator: verifiers, args: {id: wordle}}}

Its turns are taken one by one in the place of its own rollout, and its rubric scores the episode at its end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from rlflow.data.environment_rows import OF_ROWS, environment_of, is_classic, normalized, plain
from rlflow.environments.protocol import EnvironmentFault, Reply
from rlflow.types import Message


def verifiers_environment(id: str, **args: Any) -> Any:
    """An environment of the version of verifiers that is installed."""
    if is_classic():
        return VerifiersEnvironment(id, **args)
    from rlflow.environments.adapters.verifiers_tasks import TasksEnvironment

    return TasksEnvironment(id, **args)


class VerifiersEnvironment:
    def __init__(self, id: str, **args: Any) -> None:
        """
        Args:
            id: Of an environment that is installed.
            args: Of its ``load_environment``.
        """
        self._made = environment_of(id, json.dumps(args, sort_keys=True))
        self._state: Any = None
        self._prompt: list[Any] = []

    @property
    def tools(self) -> list[dict[str, Any]]:
        return [described(tool) for tool in self._made.tool_defs or []]

    async def reset(self, row: Mapping[str, Any]) -> list[Message] | None:
        given = {"prompt": list(row["messages"]), **{name: row[name] for name in OF_ROWS if row.get(name) is not None}}
        self._state = await self._made.init_state(given, no_client(), "policy")
        await self._made.setup_state(self._state)
        self._prompt = list(await self._made.get_prompt_messages(self._state))
        begins = plain(self._prompt)
        return None if begins == plain(normalized(row["messages"])) else begins

    async def step(self, message: Message) -> Reply:
        said = list(normalized([message]))
        step = {"prompt": self._prompt, "completion": said, "response": None, "tokens": None, "reward": None}
        step |= {"advantage": None, "is_truncated": False, "trajectory_id": self._state["trajectory_id"], "extras": {}}
        await self._made.add_trajectory_step(self._state, step)
        if await self._made.is_completed(self._state):
            return Reply(done=True)
        prompt = list(await self._made.get_prompt_messages(self._state))
        if await self._made.is_completed(self._state):
            return Reply(done=True)
        before = [*self._prompt, *said]
        if plain(prompt[: len(before)]) != plain(before):
            raise EnvironmentFault("it writes anew what was said before, which only a chat template may")
        self._prompt = prompt
        return Reply(plain(prompt[len(before) :]))

    async def finish(self) -> float:
        """The rubric's reward of the episode."""
        await self._made.render_completion(self._state)
        await self._made.rubric.score_rollout(self._state)
        await self._made.cleanup(self._state)
        return float(self._state["reward"])

    def state(self) -> dict[str, Any]:
        return {"metrics": self._state["metrics"], "stop_condition": self._state.get("stop_condition")}


def described(tool: Any) -> dict[str, Any]:
    """A tool of verifiers' in OpenAI's form."""
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
    }


def no_client() -> Any:
    """In the place of what generates for verifiers: rlflow does."""
    client = import_module("verifiers.clients").Client
    methods = dict.fromkeys(client.__abstractmethods__)
    return object.__new__(type("NoClient", (client,), methods))
