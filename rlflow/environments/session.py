"""One episode's environment, from the process that it runs in: requests in, answers that JSON can hold out."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import random
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlflow.data.errors import RowError
from rlflow.data.messages import to_message
from rlflow.environments.methods import MethodsEnvironment
from rlflow.environments.protocol import Environment, EnvironmentFault, Reply, told
from rlflow.environments.tools import described
from rlflow.types import Message

MOST_STATE_CHARACTERS = 65_536
MOST_ERROR_CHARACTERS = 4000
LARGEST_NUMBER = 1.0e30
"""Sums of larger ones may be more than 32 bits hold."""
COUNT_NAME = re.compile(r"[\w.-]{1,64}")
RESERVED_COUNTS = frozenset(
    {"turns", "max_turns", "reward", "failed_fraction", "seconds", "sequences", "tool_calls", "unread_calls"}
    | {"control_texts", *(f"ended_by_{reason}" for reason in ("stop", "length", "turns", "time"))}
)
"""Names of metrics that are not the environment's own."""
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
        """The tools of an environment that is made for this alone, and the columns that it needs by name."""
        environment: Any = self._make()
        require_signatures(environment)
        tools: Any = own(environment, "tools") or []
        columns = environment.columns if isinstance(environment, MethodsEnvironment) else []
        if callable(tools):
            tools = tools()
        return {"tools": described(tools), "columns": columns}

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
        done = truth(reply.done)
        messages = [] if done else messages_of(reply.messages, "step")
        if not messages and not done:
            raise EnvironmentFault("step returned nothing for the policy to hear, and is not done")
        return {"messages": messages, "reward": number(reply.reward), "done": done, "counts": counts_of(reply.counts)}

    def finish(self) -> Answer:
        """The last reward, and the state that is kept."""
        finish = own(self._environment, "finish")
        last = None if finish is None else self._run(finish())
        state = own(self._environment, "state")
        state = self._run(state() if callable(state) else state)
        return {"reward": 0.0 if last is None else number(last), "state": kept_state(state)}

    def _run(self, result: Any) -> Any:
        if not inspect.isawaitable(result):
            return result

        async def awaited() -> Any:
            return await result

        return self._loop.run_until_complete(awaited())


def own(environment: Any, name: str) -> Any:
    """An attribute of an environment; None where it has none. What a property raises is raised, an AttributeError
    too."""
    return getattr(environment, name) if name in dir(environment) else None


def messages_of(said: Any, verb: str) -> list[Message]:
    """What was said, as messages; text is a user's.

    Raises:
        EnvironmentFault: It is neither.
    """
    if isinstance(said, str):
        if not said.strip():
            raise EnvironmentFault(
                f"{verb} returned an empty text: return what the policy is to hear, such as '(nothing)', or None"
            )
        said = [{"role": "user", "content": said}]
    reply = "" if verb == "reset" else "a Reply (messages, reward, done), "
    if not isinstance(said, list) and not (isinstance(said, tuple) and all(isinstance(one, dict) for one in said)):
        raise EnvironmentFault(
            f"{verb} returned a {type(said).__name__}: return text, a list of messages, {reply}or None"
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


def number(value: Any, what: str = "its reward") -> float:
    """A number that is finite in 32 bits, as rewards travel.

    Raises:
        EnvironmentFault: It is none.
    """
    try:
        found = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not abs(found) <= LARGEST_NUMBER:
        raise EnvironmentFault(f"{what} is {value!r:.80}: give a finite number")
    return found


def counts_of(counts: Any) -> dict[str, float]:
    """What is counted, by name; whole numbers stay such.

    Raises:
        EnvironmentFault: It is no mapping of names to numbers, or has a name that rlflow's own metrics have.
    """
    if not isinstance(counts, Mapping):
        raise EnvironmentFault(f"its counts are a {type(counts).__name__}: give a mapping of names to numbers")
    found: dict[str, float] = {}
    for name, value in counts.items():
        if not isinstance(name, str) or not COUNT_NAME.fullmatch(name) or name in RESERVED_COUNTS:
            reserved = ", ".join(sorted(RESERVED_COUNTS))
            raise EnvironmentFault(
                f"it counts {name!r:.80}: take a name of letters, digits and _ that is not {reserved}"
            )
        count = number(value, f"its count {name!r}")
        found[name] = int(count) if count.is_integer() else count
    return found


def truth(done: Any) -> bool:
    """Whether an episode is over: a bool, Python's or numpy's; None is False.

    Raises:
        EnvironmentFault: It is something else.
    """
    if done is None or type(done).__name__ in ("bool", "bool_"):
        return bool(done)
    raise EnvironmentFault(f"its done is {done!r:.80}: give True or False")


def kept_state(state: Any) -> Any:
    """A state as JSON holds it: numpy's numbers and arrays as Python's, other objects as they are printed.

    Raises:
        EnvironmentFault: JSON cannot hold it.
    """
    try:
        text = json.dumps(state, default=_plain, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise EnvironmentFault(
            f"its state cannot be kept as JSON ({error}): give texts, numbers, lists, dicts"
        ) from error
    if len(text) > MOST_STATE_CHARACTERS:
        return f"a state of {len(text):,} characters, which is too long to keep"
    return json.loads(text, parse_constant=lambda constant: None)


def _plain(value: Any) -> Any:
    """numpy's and torch's values as Python's; anything else as it is printed."""
    as_list = getattr(value, "tolist", None)
    return as_list() if callable(as_list) else str(value)


def require_signatures(environment: Any) -> None:
    """
    Raises:
        EnvironmentFault: A method does not take what it will be given.
    """
    for name, given in (("reset", ["row"]), ("step", ["message"]), ("finish", [])):
        if (method := own(environment, name)) is not None:
            try:
                inspect.signature(method).bind(*given)
            except TypeError as error:
                raise EnvironmentFault(f"it is called as {name}({', '.join(given)}), and {name} has {error}") from error


def describe_error(error: BaseException) -> str:
    """What was raised, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return told(error)[:MOST_ERROR_CHARACTERS] + place
