"""Models to talk to: an `rlflow serve` for the one that somebody talks to, ended when nobody does.

The browser speaks to this server alone, which passes chat completions on as they are streamed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import aiohttp
from aiohttp import web

from rlflow.ui.commands import TOKEN_VARIABLE
from rlflow.ui.refusal import Refusal

IDLE_SECONDS = 15 * 60.0
"""A model that nobody has talked to for so long gives its memory back."""
START_SECONDS = 300.0
"""How long a model may take to load."""
ANSWER_SECONDS = 600.0
"""How long an answer may take."""
STOP_SECONDS = 10.0
KEPT_LINES = 40
MOST_BYTES = 16 << 20
"""Of an answer."""
_ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1

ServeCommand = Callable[[Path, str | None], Sequence[str]]


def serve_command(directory: Path, checkpoint: str | None) -> Sequence[str]:
    """The command that serves a run's model on a free port of this machine."""
    chosen = [] if checkpoint is None else ["--checkpoint", checkpoint]
    return [sys.executable, "-m", "rlflow", "serve", str(directory), *chosen, "--engine", "torch", "--port", "0"]


def _reason(said: str) -> str:
    """What an OpenAI server says against a request, in the form that OpenAI gives it or in any other."""
    try:
        return str(json.loads(said)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return said[:2000]


def _end_with_parent() -> None:
    """Asks the kernel to end a new process with this one, however this one ends."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class ModelServer:
    """One `rlflow serve`: starting, ready, or ended with what it said last."""

    def __init__(self, name: str, checkpoint: str | None) -> None:
        self.name, self.checkpoint = name, checkpoint
        self.state: Literal["starting", "ready", "ended"] = "starting"
        self.said: deque[str] = deque(maxlen=KEPT_LINES)
        self.used = time.monotonic()
        self.answering = 0
        self.url = ""
        self.model = ""
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, command: Sequence[str], http: aiohttp.ClientSession) -> None:
        """Starts the process, and finds out where it listens and what it calls its model."""
        environment = {key: value for key, value in os.environ.items() if key != TOKEN_VARIABLE}
        self.process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=_end_with_parent,
            limit=1 << 20,
        )
        listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read(self.process, listening))
        try:
            self.url = await asyncio.wait_for(listening, START_SECONDS)
            async with asyncio.timeout(START_SECONDS):
                self.model = await self._first_model(http)
            self.state, self.used = "ready", time.monotonic()
        except (TimeoutError, EOFError, aiohttp.ClientError, LookupError, ValueError) as error:
            self.said.append(str(error) or "it did not start in time")
            await self.end()

    async def end(self) -> None:
        """Ends the process and all that it started, which it is given some seconds for."""
        self.state = "ended"
        process = self.process
        if process is None or process.returncode is not None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
                return

    async def _read(self, process: asyncio.subprocess.Process, listening: asyncio.Future[str]) -> None:
        """Keeps the newest lines of what the process says, to its end."""
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:
                continue  # longer than any line that is of use here
            if not line:
                break
            text = line.decode(errors="replace").rstrip()
            if self.state != "ended":  # why it was ended stays its last word
                self.said.append(text)
            if (match := _ADDRESS.search(text)) and not listening.done():
                listening.set_result(match[0])
        code = await process.wait()
        self.state = "ended"
        if not listening.done():
            listening.set_exception(EOFError(f"`rlflow serve` ended with exit code {code}"))

    async def _first_model(self, http: aiohttp.ClientSession) -> str:
        while True:
            try:
                async with http.get(f"{self.url}/v1/models") as response:
                    if response.status == 200:
                        return str((await response.json())["data"][0]["id"])
            except aiohttp.ClientConnectionError:
                pass  # it says where it will listen before it does
            if self.state == "ended":
                raise EOFError("`rlflow serve` ended while it started")
            await asyncio.sleep(0.2)


class Chats:
    """Keeps one model loaded at most: this machine may have memory for one.

    Args:
        command: What serves a directory.
        idle_s: See `IDLE_SECONDS`.
    """

    def __init__(self, command: ServeCommand = serve_command, idle_s: float = IDLE_SECONDS) -> None:
        self._command, self._idle_s = command, idle_s
        self.server: ModelServer | None = None
        self._http: aiohttp.ClientSession | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self, name: str, directory: Path, checkpoint: str | None) -> ModelServer:
        """Loads a model, unless it is the one that is loaded. Another one gives way, but not in mid-sentence.

        Raises:
            Refusal: Somebody is being answered by another model.
        """
        now = self.server
        if now is not None and now.state != "ended":
            if (now.name, now.checkpoint) == (name, checkpoint):
                now.used = time.monotonic()
                return now
            if now.answering:
                raise Refusal(409, f"{now.name} is answering somebody: one model is loaded at a time; try again soon")
        server = self.server = ModelServer(name, checkpoint)
        if now is not None:
            await now.end()
        if self._http is None:
            timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS, sock_connect=10)
            self._http = aiohttp.ClientSession(timeout=timeout)
        self._keep(asyncio.create_task(server.start(self._command(directory, checkpoint), self._http)))
        self._keep(asyncio.create_task(self._end_when_idle(server)))
        return server

    async def answer(self, request: web.Request, name: str, body: dict[str, object]) -> web.StreamResponse:
        """Passes a chat completion on, event by event as it comes.

        Raises:
            Refusal: The model is not loaded, or did not answer.
        """
        server, http = self.server, self._http
        if server is None or http is None or server.name != name or server.state != "ready":
            raise Refusal(409, f"{name} is not loaded: open the chat again")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"})
        server.answering += 1
        try:
            url = f"{server.url}/v1/chat/completions"
            asked = {**body, "model": server.model, "stream": True}
            async with http.post(url, json=asked) as answer:
                if answer.status != 200:
                    raise Refusal(422, f"the model's server refused: {_reason(await answer.text())}")
                await response.prepare(request)
                size = 0
                async for data in answer.content.iter_any():
                    size += len(data)
                    if size > MOST_BYTES:
                        break
                    await response.write(data)
                await response.write_eof()
        except aiohttp.ClientConnectionResetError:
            pass  # the browser has gone, or does not want to hear more
        except (aiohttp.ClientError, TimeoutError) as error:
            if not response.prepared:
                raise Refusal(502, f"the model's server did not answer: {error}") from error
            cut = {"error": {"message": "the answer was cut off: the model's server ended, or took too long"}}
            await response.write(f"data: {json.dumps(cut)}\n\n".encode())
            await response.write_eof()
        finally:
            server.answering -= 1
            server.used = time.monotonic()
        return response

    async def close(self) -> None:
        """Ends the model's server."""
        for task in list(self._tasks):
            task.cancel()
        if self.server is not None:
            await self.server.end()
        if self._http is not None:
            await self._http.close()

    async def _end_when_idle(self, server: ModelServer) -> None:
        while server.state != "ended":
            left = server.used + self._idle_s - time.monotonic()
            if left <= 0 and server.state == "ready" and not server.answering:
                server.said.append(f"ended: nobody asked it anything for {self._idle_s:.0f} s")
                await server.end()
                return
            await asyncio.sleep(max(left, 0.05 if self._idle_s < 1 else 1.0))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
