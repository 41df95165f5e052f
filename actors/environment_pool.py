"""EnvironmentPool: a process for each episode, forked from one that has imported the environment.

Everything here runs in one asyncio loop. A step that takes too long is killed with its episode's process, and whatever
that started; its neighbours are processes of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import pickle
import socket
from collections.abc import Mapping
from typing import Any

from rlflow.actors.environment_wire import MAX_ANSWER_BYTES, EnvironmentSetup, decoded
from rlflow.actors.reward_process import RewardProcess, child_environment
from rlflow.actors.reward_wire import HEADER, frame
from rlflow.environments.protocol import EnvironmentFault
from rlflow.recipe import EnvironmentBlock
from rlflow.tracking.redact import redact_text, remember_secrets
from rlflow.tracking.visible import one_line

START_TIMEOUT_S = 120.0
"""An environment that is not imported by then is an error; so is a process that is not forked."""
END_TIMEOUT_S = 10.0
MOST_EPISODES = 64
"""Of one process of an adapter, one after the other: what it leaves in memory does not grow for ever."""
MAX_MESSAGE = 500


class EnvironmentPool:
    def __init__(self, block: EnvironmentBlock) -> None:
        remember_secrets([dict(block.args)])
        remember_secrets({"secret": [os.environ[name] for name in block.variables if name in os.environ]})
        self.block = block
        self.num_restarts = 0
        self._setup = pickle.dumps(
            EnvironmentSetup(
                block.name,
                block.plugin,
                tuple(block.tools),
                dict(block.args),
                parent_pid=os.getpid(),
                memory_bytes=int(block.memory_gib * 2**30),
            )
        )
        self._variables = child_environment(os.environ, block.variables)
        self._source: _Source | None = None
        self._starting = asyncio.Lock()
        self._idle: list[EnvironmentProcess] = []

    async def begin(self) -> EnvironmentProcess:
        """A process for one more episode: one whose episode has ended well, or a new one.

        Raises:
            EnvironmentFault: The environment cannot be imported, or its process ends again and again.
        """
        while self._idle:
            process = self._idle.pop()
            if process.is_alive:
                return process
            await process.close()
        source = await self._ready_source()
        own, theirs = socket.socketpair()
        try:
            own.setblocking(False)
            said = await source.ask(pickle.dumps("begin"), theirs.fileno())
        except BaseException:
            own.close()
            raise
        finally:
            theirs.close()
        return EnvironmentProcess(own, source, said["pid"])

    async def give_back(self, process: EnvironmentProcess) -> None:
        """Takes the process of an episode that has ended well. An adapter's may serve another one, as what it loads may
        take long. What the user's own code leaves behind (a global variable, a thread, another directory) would make an
        episode depend on those before it: each has a process that has done nothing but import."""
        process.num_episodes += 1
        if self.block.name is not None and process.num_episodes < MOST_EPISODES:
            self._idle.append(process)
        else:
            await process.close()

    async def describe(self) -> list[dict[str, Any]]:
        """The tools of the environment, as JSON schemas.

        Raises:
            EnvironmentFault: It cannot be made, or a tool cannot be described.
        """
        process = await self.begin()
        try:
            return (await process.ask(START_TIMEOUT_S, "describe"))["tools"]
        finally:
            await process.close()

    def close(self) -> None:
        """Kills all processes."""
        if self._source is not None:
            self._source.close()
            self._source = None

    async def _ready_source(self) -> _Source:
        async with self._starting:
            if self._source is not None and self._source.is_gone:
                ending = self._source.close()
                self._source = None
                self.num_restarts += 1
                if self.num_restarts > self.block.max_restarts:
                    raise EnvironmentFault(
                        f"the process that episodes start from has ended {self.num_restarts} times ({ending}): look at "
                        "what the environment does while it is imported, and at its machine's memory"
                    )
            if self._source is None:
                self._source = _Source(self._setup, self._variables)
            await self._source.wait_ready()
            return self._source


class _Source:
    """The process that episodes are forked from, from the worker's side."""

    def __init__(self, setup: bytes, variables: Mapping[str, str]) -> None:
        self._process = RewardProcess(setup, variables, "rlflow.actors.environment_child")
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._owed: dict[int, asyncio.Future[dict[str, Any]]] = {0: self._loop.create_future()}
        self.is_gone = False
        for descriptor in self._process.descriptors:
            self._loop.add_reader(descriptor, self._advance)
        self._advance()

    async def wait_ready(self) -> None:
        """Raises EnvironmentFault where the environment cannot be imported."""
        try:
            said = await asyncio.wait_for(asyncio.shield(self._owed[0]), START_TIMEOUT_S)
        except TimeoutError:
            raise EnvironmentFault(f"the environment was not imported within {START_TIMEOUT_S:g} s") from None
        if "fatal" in said:
            raise EnvironmentFault(said["fatal"])

    async def ask(self, body: bytes, descriptor: int | None = None) -> dict[str, Any]:
        """Raises EnvironmentFault where the process has ended, or says nothing."""
        call_id = next(self._ids)
        self._owed[call_id] = future = self._loop.create_future()
        try:
            if self.is_gone:
                raise EnvironmentFault("the process that episodes start from has ended")
            if descriptor is None:
                self._process.send(call_id, body)
                self._advance()
            else:
                self._process.send_descriptor(call_id, body, descriptor)
            return await asyncio.wait_for(future, START_TIMEOUT_S)
        except (TimeoutError, OSError) as error:
            raise EnvironmentFault(f"no process could be started for an episode: {error!r}") from error
        finally:
            self._owed.pop(call_id, None)

    def close(self) -> str:
        """Kills it and all that it started. Returns how it had ended."""
        if self.is_gone and self._process is None:
            return "closed"
        for descriptor in self._process.descriptors:
            self._loop.remove_reader(descriptor)
        self._gone()
        return self._process.kill()

    def _advance(self) -> None:
        for call_id, said in self._process.advance():
            future = self._owed.get(call_id)
            if future is not None and not future.done():
                future.set_result(said)
        if self._process.closed and not self.is_gone:
            self._gone()
            for descriptor in self._process.descriptors:
                self._loop.remove_reader(descriptor)

    def _gone(self) -> None:
        self.is_gone = True
        for call_id, future in self._owed.items():
            if not future.done():
                what = "could not be imported: its process ended" if call_id == 0 else "lost its process"
                future.set_exception(EnvironmentFault(f"the environment {what}"))
                future.exception()  # who does not wait for it need not hear of it


class EnvironmentProcess:
    """The process of one episode's environment, from the worker's side."""

    def __init__(self, connection: socket.socket, source: _Source, pid: int) -> None:
        self._connection, self._source, self.pid = connection, source, pid
        self._is_closed = False
        self.num_episodes = 0

    @property
    def is_alive(self) -> bool:
        """Whether it waits for an episode."""
        if self._is_closed or self._source.is_gone:
            return False
        try:
            # It says nothing unasked, so that there is nothing to read but its end.
            self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    async def ask(self, timeout_s: float, verb: str, *arguments: Any) -> dict[str, Any]:
        """What the environment answers.

        Raises:
            EnvironmentFault: It did something that no environment may, ended its process, or took too long; it is then
                killed.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                await loop.sock_sendall(self._connection, frame(1, pickle.dumps((verb, *arguments))))
                _, length = HEADER.unpack(await self._read(HEADER.size))
                if length > 2 * MAX_ANSWER_BYTES:
                    raise ValueError(f"an answer of {length} bytes")
                said = decoded(await self._read(length))
        except TimeoutError:
            await self.close()
            raise EnvironmentFault(f"{verb} gave no answer within {timeout_s:g} s") from None
        except (OSError, EOFError):
            await self.close()
            raise EnvironmentFault(f"{verb} ended its process") from None
        except ValueError as error:
            await self.close()
            raise EnvironmentFault(f"{verb} said what is no answer: {error}") from None
        if "error" in said:
            raise EnvironmentFault(one_line(redact_text(str(said["error"])))[:MAX_MESSAGE])
        return said

    async def close(self) -> None:
        """Kills the process and what it started, and waits until it is gone. Safe to call twice."""
        if self._is_closed:
            return
        self._is_closed = True
        self._connection.close()
        if not self._source.is_gone:
            with contextlib.suppress(EnvironmentFault):
                await asyncio.wait_for(self._source.ask(pickle.dumps(self.pid)), END_TIMEOUT_S)

    async def _read(self, length: int) -> bytes:
        loop, parts = asyncio.get_running_loop(), bytearray()
        while len(parts) < length:
            part = await loop.sock_recv(self._connection, length - len(parts))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)


def describe(block: EnvironmentBlock) -> list[dict[str, Any]]:
    """`EnvironmentPool.describe` for a process that has no loop."""

    async def described() -> list[dict[str, Any]]:
        pool = EnvironmentPool(block)
        try:
            return await pool.describe()
        finally:
            pool.close()

    return asyncio.run(described())
