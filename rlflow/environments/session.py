"""One episode's environment, from the process that it runs in: requests in, answers that JSON can hold out."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import random
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlflow.data.errors import RowError
from rlflow.data.messages import to_message
from rlflow.environments.protocol import Environment, EnvironmentFault, Reply
from rlflow.types import Message

MOST_STATE_CHARACTERS = 65_536
Answer = dict[str, Any]


def warm_up() -> None:
    """Has everything imported that an episode would import first."""
    _seed(0)
    asyncio.new_event_loop().close()


def _seed(seed: int) -> None:
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


class Session:
    """``answer`` never raises: what the environment did wrong is in the answer, under ``error``."""

    def __init__(self, make: Callable[[], Environment]) -> None:
        self._make = make
        self._environment: Any = None
        self._loop = asyncio.new_event_loop()

    def answer(self, verb: str, *arguments: Any) -> Answer:
        """
        Args:
            verb: reset (with a row and a seed), step (with a message), finish or describe.
        """
        try:
            return {"reset": self.reset, "step": self.step, "finish": self.finish, "describe": self.describe}[verb](
                *arguments
            )
        except EnvironmentFault as error:
            return {"error": str(error)}
        # The user's code: SystemExit is no Exception.
        except BaseException as error:
            return {"error": f"{verb} raised {describe_error(error)}"}

    def describe(self) -> Answer:
        """The tools of an environment that is made for this alone."""
        from rlflow.environments.tools import described

        return {"tools": described(self._tools(self._make()))}

    def reset(self, row: Mapping[str, Any], seed: int) -> Answer:
        """Makes the environment and begins; whoever draws from Python's or numpy's global generator draws the same for
        the same seed."""
        _seed(seed)
        self._environment = self._make()
        said = self._run(self._environment.reset(row))
        return {"messages": None if said is None else messages_of(said, "reset")}

    def step(self, message: Message) -> Answer:
        said = self._run(self._environment.step(message))
        reply = said if isinstance(said, Reply) else Reply(done=True) if said is None else Reply(said)
        messages = [] if reply.done else messages_of(reply.messages, "step")
        if not messages and not reply.done:
            raise EnvironmentFault("step returned nothing for the policy to hear, and is not done")
        counts = {str(name): int(count) for name, count in reply.counts.items()}
        return {"messages": messages, "reward": number(reply.reward), "done": bool(reply.done), "counts": counts}

    def finish(self) -> Answer:
        """The last reward, and the state that is kept."""
        environment = self._environment
        last = self._run(environment.finish()) if callable(getattr(environment, "finish", None)) else None
        state = getattr(environment, "state", None)
        state = self._run(state()) if callable(state) else state
        text = json.dumps(state, default=str, ensure_ascii=False)
        if len(text) > MOST_STATE_CHARACTERS:
            text = json.dumps(f"a state of {len(text):,} characters, which is too long to keep")
        return {"reward": 0.0 if last is None else number(last), "state": json.loads(text)}

    def _run(self, result: Any) -> Any:
        if not inspect.isawaitable(result):
            return result

        async def awaited() -> Any:
            return await result

        return self._loop.run_until_complete(awaited())

    @staticmethod
    def _tools(environment: Any) -> list[Any]:
        tools: Any = getattr(environment, "tools", None) or []
        if callable(tools):
            tools = tools()
        return [*tools]


def messages_of(said: Any, verb: str) -> list[Message]:
    """What was said, as messages; text is a user's.

    Raises:
        EnvironmentFault: It is neither.
    """
    if isinstance(said, str):
        said = [{"role": "user", "content": said}]
    if not isinstance(said, list | tuple):
        raise EnvironmentFault(
            f"{verb} returned a {type(said).__name__}: return text, a list of messages, a Reply, or None"
        )
    try:
        messages = [to_message(message, f"{verb}()[{index}]") for index, message in enumerate(said)]
    except RowError as error:
        raise EnvironmentFault(f"{verb} returned what is no list of messages: {error}") from error
    if any("images" in message for message in messages):
        raise EnvironmentFault(
            f"{verb} returned a picture: an episode has those of its row alone (<image> in what reset returns is where "
            "they stand), as rollouts travel without pictures of their own. Say in words what is to be seen"
        )
    return messages


def number(reward: Any) -> float:
    """A reward.

    Raises:
        EnvironmentFault: It is none.
    """
    try:
        value = math.nan if isinstance(reward, str | bytes) else float(reward)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise EnvironmentFault(f"its reward is {reward!r:.80}: give a finite number")
    return value


def describe_error(error: BaseException) -> str:
    """What was raised, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}"[:4000] + place
