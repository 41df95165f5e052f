"""verifiers from 0.2 on (``verifiers.v1``): a taskset, and the environment that plays it with one agent.

    environment: {name: verifiers, args: {id: my-taskset}}
    data: {train: {generator: verifiers, args: {id: my-taskset, size: 500}}}

Its environment's own ``run(task, agents)`` is played, in a task of this process' loop. The agent it talks to is the
policy: each turn that it takes of it is a step, and what it says before is what the policy hears. Nothing of verifiers'
servers and programs is started, so that tool servers, several agents, and tasks that need a container are refused.

    reset --> run(task, agents) --interaction.turn("...")--> heard     step(said) --> Segment --> run goes on
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from rlflow.data.environment_rows import environment_of, opening_of, plain
from rlflow.environments.protocol import EnvironmentFault, Reply
from rlflow.types import Message


class TasksEnvironment:
    def __init__(self, id: str, **args: Any) -> None:
        """
        Args:
            id: Of a taskset that is installed.
            args: Its configuration; ``env``: the id of an environment to pair it with.
        """
        self._made = environment_of(id, json.dumps(args, sort_keys=True))
        self._seat = _seat_of(self._made)
        self._running: asyncio.Task[None] | None = None
        self._asked: asyncio.Future[list[Any]] | None = None
        self._said: asyncio.Future[Any] | None = None
        self._trace: Any = None

    async def reset(self, row: Mapping[str, Any]) -> list[Message] | None:
        taskset = self._made.taskset
        kind = type(taskset).task_type()
        task = kind(kind.data_type().model_validate(row["task"]), taskset.config.task)
        self._asked = asyncio.get_running_loop().create_future()
        self._running = asyncio.create_task(self._made.run(task, SimpleNamespace(**{self._seat: self})))
        heard = await self._heard()
        if heard is None:
            raise EnvironmentFault("it is over before the policy has said anything")
        return None if heard == list(row["messages"]) else heard

    async def step(self, message: Message) -> Reply:
        assert self._said is not None
        self._asked = asyncio.get_running_loop().create_future()
        self._said.set_result(message)
        heard = await self._heard()
        return Reply(done=True) if heard is None else Reply(heard)

    async def finish(self) -> float:
        """The reward of the one trace."""
        assert self._running is not None
        if not self._running.done() and self._said is not None and not self._said.done():
            self._said.set_result(None)
        await self._running
        return 0.0 if self._trace is None else float(self._trace.reward)

    def state(self) -> dict[str, Any]:
        if self._trace is None:
            return {}
        rewards = {name: reward and reward.value for name, reward in self._trace.rewards.items()}
        return {"rewards": rewards, "metrics": self._trace.metrics, "stop_condition": self._trace.stop_condition}

    async def _heard(self) -> list[Message] | None:
        """What is said to the policy before its next turn; None where there is none.

        Raises:
            BaseException: What its ``run`` raised.
        """
        assert self._running is not None and self._asked is not None
        await asyncio.wait([self._running, self._asked], return_when=asyncio.FIRST_COMPLETED)
        if self._asked.done():
            return plain(self._asked.result())
        self._running.result()
        return None

    # What its environment calls of an agent.

    async def run(self, task: Any) -> Any:
        """Plays a task that has a prompt; the policy has one turn."""
        async with self.interaction(task) as interaction:
            await interaction.turn()
        return interaction.trace

    @contextlib.asynccontextmanager
    async def interaction(self, task: Any) -> AsyncIterator[_Interaction]:
        vf = import_module("verifiers.v1")
        if self._trace is not None:
            raise EnvironmentFault("its environment plays several rollouts an episode: only one is trained")
        if task.NEEDS_CONTAINER or task.data.image is not None:
            raise EnvironmentFault("its tasks need a container, which rlflow does not start")
        self._trace = trace = _trace_of(task, getattr(self._made.config, self._seat))
        runtimes, decorators = import_module("verifiers.v1.runtimes"), import_module("verifiers.v1.utils.decorators")
        async with runtimes.provision_runtime(vf.SubprocessConfig(), name=trace.id) as runtime:
            given = {"trace": trace, "runtime": runtime}
            await decorators.invoke(task.setup, given)
            yield _Interaction(self, trace, task)
            trace.is_completed = True
            await decorators.invoke(task.finalize, given)
            await task.score(trace, runtime)

    async def said(self, heard: list[Any]) -> Message | None:
        """What the policy says, having heard this; None where the episode is over before it could."""
        assert self._asked is not None
        self._said = asyncio.get_running_loop().create_future()
        self._asked.set_result(heard)
        return await self._said


class _Interaction:
    """verifiers' Interaction: the rollout, one turn after the other."""

    def __init__(self, policy: TasksEnvironment, trace: Any, task: Any) -> None:
        self._policy, self._task = policy, task
        self.trace = trace
        self._messages: list[Any] = []

    async def turn(self, message: str | list[Any] | None = None) -> Any:
        """The policy's next turn: a Segment, which is ``terminated`` where there is none."""
        segment = import_module("verifiers.v1").Segment
        heard = [] if self._messages else opening_of(self._task.data)
        heard += _messages(message) if message is not None else []
        if not heard:
            raise EnvironmentFault("its environment asks for a turn and says nothing before it")
        if self.trace.stop_condition is not None:
            return segment(messages=[], terminated=True)
        said = await self._policy.said(heard)
        if said is None:
            self.trace.stop("user_closed")
            return segment(messages=[], terminated=True)
        self._messages += heard
        answer = _commit(self.trace, self._messages, said)
        self._messages.append(answer)
        await self._stop(self._task.hooks("stop"))
        return segment(messages=[answer])

    async def _stop(self, hooks: list[Any]) -> None:
        """Asks the task's own conditions, those that look at the trace."""
        session = import_module("verifiers.v1.session")
        for hook in hooks:
            if session.hook_boundary(hook, allow_trace=True) is not session.Trace:
                raise EnvironmentFault(f"its condition {hook.__name__} looks at requests, which there are none of")
            if await session.call_hook(hook, {session.Trace: self.trace}):
                self.trace.stop(hook.__name__)


def _seat_of(made: Any) -> str:
    """The name of the one agent that an environment has.

    Raises:
        EnvironmentFault: It has others, or what rlflow does not start.
    """
    vf, configs = import_module("verifiers.v1"), import_module("verifiers.v1.configs.agent")
    seats = list(configs.agent_config_fields(made.config))
    if len(seats) != 1:
        raise EnvironmentFault(f"its environment has the agents {', '.join(seats)}, and one is trained")
    taskset = made.taskset
    if taskset.toolsets(taskset.config) or type(taskset).task_type().toolsets(taskset.config.task):
        raise EnvironmentFault("it serves its tools to programs: name them as functions, environment: {tools: [...]}")
    if type(made).finalize is not vf.Env.finalize:
        raise EnvironmentFault("its environment judges whole episodes (finalize), which rlflow does not make")
    return seats[0]


def _messages(said: str | list[Any]) -> list[Any]:
    return [import_module("verifiers.v1.types").UserMessage(content=said)] if isinstance(said, str) else list(said)


def _trace_of(task: Any, config: Any) -> Any:
    trace, state = import_module("verifiers.v1.trace"), import_module("verifiers.v1.state")
    recorded = trace.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
    return trace.Trace(task=recorded, state=state.state_cls(type(task))(), agent=trace.AgentInfo(config=config))


def _commit(trace: Any, messages: list[Any], said: Message) -> Any:
    """Puts a turn of the policy into the trace. Returns it as verifiers' message."""
    types, graph = import_module("verifiers.v1.types"), import_module("verifiers.v1.graph")
    thought = next((said[key] for key in ("reasoning_content", "thinking") if said.get(key)), None)
    answer = types.AssistantMessage(content=said["content"], reasoning_content=thought)
    graph.prepare_turn(trace, list(messages)).commit(
        types.Response(id="", created=int(time.time()), model="policy", message=answer, finish_reason="stop")
    )
    return answer
