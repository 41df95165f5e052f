"""What the page asks for, as JSON: each handler takes a request apart, calls one thing, and answers.

GET  /api/runs                               every run, and what was started here
GET  /api/run?run=                           one run: charts, numbers, recipe, logs, checkpoints
GET  /api/metrics?run=&offset=&file=         what was logged behind a byte of metrics.jsonl
GET  /api/episodes?run=&step=&offset=&limit= rollouts of a step
GET  /api/log?run=&name=&offset=             a log from a byte on; ?command= for what a command printed
GET  /api/recipes, /api/recipe?file=         recipes that can be started
POST /api/check, /api/start                  {file, text, overrides, ...}
POST /api/stop, /api/resume                  {run} or {command}
GET  /api/chat?run=   POST /api/chat/open, /api/chat/completions
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from rlflow.checkpoint import saved_steps
from rlflow.recipe.yaml_source import dump
from rlflow.tracking import page_data
from rlflow.tracking.history import METRICS, HistoryError, read_stage
from rlflow.tracking.redact import redact_text
from rlflow.tracking.rollouts import RolloutFileError, num_rollouts
from rlflow.ui.chat import Chats, ModelServer
from rlflow.ui.commands import Command, Commands, is_alive
from rlflow.ui.recipes import Recipes, checked_overrides, output_directories
from rlflow.ui.refusal import Refusal
from rlflow.ui.run_list import RunList
from rlflow.ui.run_rows import Rows, rows_behind
from rlflow.ui.served import Served

LOG_BYTES = 128 << 10
"""Of a log that are sent at a time; of a longer one the end is shown first."""
LEAST_EPISODES, MOST_EPISODES = 16, 1024
EPISODE_BYTES = 1 << 20
"""Of a Parquet file, compressed, that are sent at a time: some ten times as many as JSON."""
MOST_MESSAGES = 200
MOST_NEW_TOKENS = 32_768

SUMMARY_SHARE = 20.0
"""A summary that takes a second to make is shown for so many."""
KEPT_SUMMARIES = 16


@dataclass(frozen=True, slots=True)
class Summary:
    """What was read of a stage, and until when it is good enough."""

    summary: dict[str, Any]
    expires: float
    """On the monotonic clock."""


class Api:
    def __init__(self, served: Served, recipes: Recipes, commands: Commands, chats: Chats) -> None:
        self.served, self.recipes, self.commands, self.chats = served, recipes, commands, chats
        self.list = RunList(served)
        self._listing, self._summing = asyncio.Lock(), asyncio.Lock()
        self._summaries: dict[Path, Summary] = {}

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/api/runs", self.runs),
            web.get("/api/run", self.run),
            web.get("/api/metrics", self.metrics),
            web.get("/api/episodes", self.episodes),
            web.get("/api/log", self.log),
            web.get("/api/recipes", self.recipe_files),
            web.get("/api/recipe", self.recipe_text),
            web.post("/api/check", self.check),
            web.post("/api/start", self.start),
            web.post("/api/stop", self.stop),
            web.post("/api/resume", self.resume),
            web.get("/api/chat", self.chat),
            web.post("/api/chat/open", self.open_chat),
            web.post("/api/chat/completions", self.complete),
        ]

    async def runs(self, _request: web.Request) -> web.Response:
        async with self._listing:  # many pages that ask at once do not make it slower
            cards = await asyncio.to_thread(self.list.cards)
        started = [self._shown(command) for command in self.commands.newest()]
        return answer({"directory": str(self.served.root), "runs": cards, "commands": started})

    async def run(self, request: web.Request) -> web.Response:
        name = request.query.get("run", "")
        directory = self.served.run(name)
        async with self._listing:
            card = await asyncio.to_thread(self.list.card, name)
        before = self.commands.of_run(directory)
        async with self._summing:
            summary = await asyncio.to_thread(self._summary, directory)
        shown = {
            "directory": str(self.served.root),
            "card": card,
            "summary": {key: value for key, value in summary.items() if key != "recipe"},
            "recipe": dump(summary["recipe"]) if summary["recipe"] else "",
            "logs": sorted(path.name for path in (directory / "logs").glob("*.log") if path.is_file()),
            "checkpoints": saved_steps(directory / "checkpoints"),
            "has_final": (directory / "final").is_dir(),
            "command": None if before is None else self._shown(before),
        }
        return answer(shown)

    async def metrics(self, request: web.Request) -> web.Response:
        name = request.query.get("run", "")
        if not (self.served.run(name) / METRICS).exists():
            return answer(asdict(Rows.none()))  # its first step is not done
        path = self.served.file(name, METRICS)
        rows = await asyncio.to_thread(rows_behind, path, number(request, "offset"), request.query.get("file", ""))
        return answer(asdict(rows))

    async def episodes(self, request: web.Request) -> web.Response:
        name = request.query.get("run", "")
        step, offset = number(request, "step"), number(request, "offset")
        path = self.served.file(name, f"rollouts/step_{step:06d}.parquet")
        limit = await asyncio.to_thread(most_episodes, path)
        return answer(await asyncio.to_thread(page_data.episodes, self.served.run(name), step, offset, limit))

    async def log(self, request: web.Request) -> web.Response:
        if "command" in request.query:
            path = self.commands.log(request.query["command"])
        else:
            path = self.served.file(request.query.get("run", ""), f"logs/{request.query.get('name', '')}")
        return answer(await asyncio.to_thread(read_log, path, number(request, "offset", -1)))

    async def recipe_files(self, _request: web.Request) -> web.Response:
        own, packaged = await asyncio.to_thread(lambda: (list(self.recipes.own()), list(self.recipes.packaged())))
        return answer({"files": own, "packaged": packaged})

    async def recipe_text(self, request: web.Request) -> web.Response:
        return answer({"text": await asyncio.to_thread(self.recipes.text, request.query.get("file", ""))})

    async def check(self, request: web.Request) -> web.Response:
        body = await body_of(request)
        overrides = checked_overrides(body.get("overrides", []))
        reads_data = body.get("data", True) is True
        verdict = await self.recipes.check(text(body, "file"), text(body, "text"), overrides, data=reads_data)
        return answer(asdict(verdict))

    async def start(self, request: web.Request) -> web.Response:
        """Starts a recipe that `rlflow plan` finds nothing wrong with; one that was edited is kept as a new file."""
        body = await body_of(request)
        name, given = text(body, "file"), text(body, "text")
        overrides = checked_overrides(body.get("overrides", []))
        verdict = await self.recipes.check(name, given, overrides, data=False)
        if not verdict.is_right:
            return answer(asdict(verdict), status=422)
        if given != self.recipes.text(name):
            name = self.recipes.keep(name, given, text(body, "save_as"))
        path = self.recipes.path(name)
        directories = await asyncio.to_thread(output_directories, path, overrides)
        resumes = body.get("resume") is True
        command = await self.commands.start(path, overrides, directories, resumes=resumes)
        return answer({"command": self._shown(command)})

    async def stop(self, request: web.Request) -> web.Response:
        body = await body_of(request)
        if "command" in body:
            self.commands.stop_command(text(body, "command"))
        else:
            self.commands.stop(text(body, "run"))
        return answer({})

    async def resume(self, request: web.Request) -> web.Response:
        body = await body_of(request)
        command = await self.commands.resume(text(body, "run"), checked_overrides(body.get("overrides", [])))
        return answer({"command": self._shown(command)})

    async def chat(self, request: web.Request) -> web.Response:
        return answer(_chat(self.chats.server, request.query.get("run", "")))

    async def open_chat(self, request: web.Request) -> web.Response:
        body = await body_of(request)
        name = text(body, "run")
        chosen = body.get("checkpoint")
        if chosen not in (None, "best", "latest") and not (isinstance(chosen, str) and chosen.isdecimal()):
            raise Refusal(422, "checkpoint is best, latest or a step")
        server = await self.chats.open(name, self.served.run(name), chosen)
        return answer(_chat(server, name))

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await body_of(request)
        messages = body.get("messages")
        if not isinstance(messages, list) or not 0 < len(messages) <= MOST_MESSAGES:
            raise Refusal(422, f"messages are a list of 1 to {MOST_MESSAGES}")
        asked: dict[str, object] = {"messages": messages}
        for key, low, high in (("temperature", 0.0, 10.0), ("top_p", 0.0, 1.0), ("max_tokens", 1, MOST_NEW_TOKENS)):
            if (value := body.get(key)) is not None:
                if not isinstance(value, int | float) or not low <= value <= high:
                    raise Refusal(422, f"{key} is a number from {low:g} to {high:g}")
                asked[key] = value
        return await self.chats.answer(request, text(body, "run"), asked)

    def _summary(self, directory: Path) -> dict[str, Any]:
        """A stage's summary, which reads all of its metrics: of a long run it is made anew now and then."""
        known = self._summaries.get(directory)
        if known is not None and time.monotonic() < known.expires:
            return known.summary
        begun = time.monotonic()
        summary = page_data.stage_summary(read_stage(directory))
        ended = time.monotonic()
        if len(self._summaries) >= KEPT_SUMMARIES:
            self._summaries.clear()
        self._summaries[directory] = Summary(summary, ended + SUMMARY_SHARE * (ended - begun))
        return summary

    def _shown(self, command: Command) -> dict[str, Any]:
        names = [self.served.name_of(Path(directory)) for directory in command.directories]
        return {
            "id": command.id,
            "command": redact_text(" ".join(["rlflow", *command.arguments])),
            "started": command.started,
            "is_alive": is_alive(command),
            "exit_code": command.exit_code,
            "runs": [name for name in names if name is not None],
        }


def _chat(server: ModelServer | None, name: str) -> dict[str, Any]:
    if server is None or server.name != name:
        return {"state": "closed", "said": []}
    said = [redact_text(line) for line in server.said] if server.state != "ready" else []
    return {"state": server.state, "checkpoint": server.checkpoint, "model": server.model, "said": said}


def most_episodes(path: Path) -> int:
    """So many rollouts of a file as can be sent at once: many short ones, a few long ones."""
    size, rows = path.stat().st_size, num_rollouts(path)
    return max(LEAST_EPISODES, min(MOST_EPISODES, rows * EPISODE_BYTES // max(1, size)))


def read_log(path: Path, offset: int) -> dict[str, Any]:
    """A part of a log: from a byte on, or its end where the byte is negative or the file has become shorter."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = max(0, size - LOG_BYTES) if offset < 0 or offset > size else offset
        file.seek(start)
        data = file.read(LOG_BYTES)
    # A character that is only half there is sent when it is whole, at the latest with the next piece.
    cut = next((n for n in (1, 2, 3) if len(data) > n and data[-n] >= 0xC0), 0)
    data = data[:-cut] if cut and start + len(data) == size else data
    return {"text": redact_text(data.decode(errors="replace")), "start": start, "end": start + len(data), "size": size}


async def body_of(request: web.Request) -> dict[str, Any]:
    """The JSON object that a call brings. Raises Refusal."""
    try:
        body = json.loads(await request.text())
    except web.HTTPRequestEntityTooLarge:
        raise Refusal(413, "that is more than a recipe can be") from None
    except (ValueError, RecursionError, LookupError):
        raise Refusal(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise Refusal(400, "the body must be a JSON object")
    return body


def text(body: dict[str, Any], key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str):
        raise Refusal(422, f"{key} is missing")
    return value


def number(request: web.Request, key: str, default: int = 0) -> int:
    try:
        return int(request.query.get(key, default))
    except ValueError:
        raise Refusal(422, f"{key} must be a whole number") from None


def answer(data: Any, status: int = 200) -> web.Response:
    """JSON, compressed where it is long."""
    response = web.json_response(page_data.plain(data), status=status)
    response.enable_compression()
    return response


def readable(handler: Callable[..., Any]) -> Callable[..., Any]:
    """What cannot be read in a run's directory is the answer, and no failure of the server."""

    async def answered(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except (HistoryError, RolloutFileError) as error:
            raise Refusal(422, str(error)) from error
        except OSError as error:
            raise Refusal(404, f"{error.filename or 'a file'} cannot be read: {error.strerror}") from error

    return answered
