"""A server that speaks as OpenAI's does, over engines of this process: what runs is written token by token for all of
its requests together.

    GET  /health /v1/models          POST /v1/chat/completions /v1/completions /tokenize

A client that goes away ends its requests.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from rlflow.driver.errors import RunError
from rlflow.driver.sampling import sample_seed
from rlflow.serving.addresses import is_loopback
from rlflow.serving.models import ServedModel
from rlflow.serving.openai_answers import Answers, Choice, models_object
from rlflow.serving.openai_requests import RequestError, Wanted, model_of, parse, tokenized
from rlflow.serving.streams import Ask, Piece, Streams

if TYPE_CHECKING:
    from rlflow.actors.rollout_engines.prompt_logprobs import PromptLogprobs

MOST_BYTES = 64 << 20
"""Of a request."""
SILENCE_S = 600.0
"""An engine that writes no token of a request for so long does not work any more."""
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class OpenAIServer:
    def __init__(self, models: Mapping[str, ServedModel], streams: Streams, token: str | None) -> None:
        """
        Args:
            models: By the names that clients ask for.
            token: What clients must send as ``Authorization: Bearer``; None: whoever is on this machine may ask.
        """
        self.models, self.streams, self.token = dict(models), streams, token
        self.created = int(time.time())
        self._reading = asyncio.Lock()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MOST_BYTES, middlewares=[_with_error_objects, self._admit])
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.list_models)
        app.router.add_get("/v1/models/{name:.+}", self.show_model)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/tokenize", self.tokenize)
        return app

    async def health(self, request: web.Request) -> web.Response:
        self._require_engine()
        return web.json_response({"status": "ok", "requests": self.streams.num_under_way})

    async def list_models(self, request: web.Request) -> web.Response:
        return web.json_response(models_object(list(self.models.items()), self.created))

    async def show_model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        return web.json_response(models_object([(name, model_of(name, self.models))], self.created)["data"][0])

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, is_chat=True)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, is_chat=False)

    async def tokenize(self, request: web.Request) -> web.Response:
        """As vLLM's: the ids of a text."""
        body = await _read_body(request)
        return web.json_response(tokenized(body, self.models))

    async def _answer(self, request: web.Request, *, is_chat: bool) -> web.StreamResponse:
        self._require_engine()
        body = await _read_body(request)
        async with self._reading:
            # Beside the loop: a large picture takes a while.
            wanted = await asyncio.to_thread(parse, body, self.models, is_chat=is_chat)
        answers = Answers(self.models[wanted.model], wanted, is_chat=is_chat)
        pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        ids = self._submit(answers, pieces)
        try:
            if not wanted.stream:
                answers.of_prompts = await self._of_prompts(wanted)
                async for _ in self._pieces(answers, pieces, ids):
                    pass
                return web.json_response(answers.whole())
            return await self._stream(request, answers, self._pieces(answers, pieces, ids))
        finally:
            # What has ended is left out: a client that has gone ends what it was waiting for.
            self.streams.cancel(ids)

    def _submit(self, answers: Answers, pieces: asyncio.Queue[tuple[int, Piece]]) -> list[int]:
        loop, wanted = asyncio.get_running_loop(), answers.wanted
        seed = secrets.randbits(63) if wanted.seed is None else wanted.seed

        def teller(index: int) -> Callable[[Piece], None]:
            return lambda piece: _call(loop, pieces, (index, piece))

        asks = [
            Ask(
                wanted.model,
                wanted.prompts[choice.index // wanted.n].token_ids,
                sample_seed(seed, "openai", choice.index // wanted.n, choice.index % wanted.n),
                wanted.params[choice.index // wanted.n],
                teller(choice.index),
                wanted.prompts[choice.index // wanted.n].images,
                wanted.prompts[choice.index // wanted.n].engine_token_ids,
            )
            for choice in answers.choices
        ]
        try:
            return self.streams.submit(asks)
        except RuntimeError as error:
            raise RequestError(str(error), code="engine_error", status=503) from error

    async def _of_prompts(self, wanted: Wanted) -> list[PromptLogprobs]:
        """What the model gives the tokens of each prompt, where that is wanted."""
        if (k := wanted.prompt_logprobs) is None:
            return []
        said = []
        try:
            said += [self.streams.read(wanted.model, prompt.token_ids, k) for prompt in wanted.prompts]
            async with asyncio.timeout(SILENCE_S):
                return [await asyncio.wrap_future(one) for one in said]
        except TimeoutError:
            silence = f"the engine has read no text for {SILENCE_S:g} s"
            raise RequestError(silence, code="engine_error", status=500) from None
        except RuntimeError as error:
            raise RequestError(str(error), code="engine_error", status=503) from error
        except ValueError as error:
            raise RequestError(str(error), param="prompt_logprobs") from error
        finally:
            # Of a client that has gone nothing more is read.
            for one in said:
                one.cancel()

    async def _pieces(
        self, answers: Answers, pieces: asyncio.Queue[tuple[int, Piece]], ids: list[int]
    ) -> AsyncIterator[tuple[Choice, str]]:
        """(choice, new text), until all answers have ended."""
        while not answers.is_done:
            try:
                # `wait_for` would let a cancellation pass that comes together with a piece.
                async with asyncio.timeout(SILENCE_S):
                    index, piece = await pieces.get()
            except TimeoutError:
                silence = f"the engine has written nothing for {SILENCE_S:g} s"
                raise RequestError(silence, code="engine_error", status=500) from None
            if piece.finish_reason == "error":
                raise RequestError(f"the engine failed: {piece.error}", code="engine_error", status=500)
            choice = answers.choices[index]
            if choice.finish_reason:
                continue
            new = choice.take(piece, with_logprobs=answers.wanted.logprobs)
            if choice.decoder.is_stopped:
                self.streams.cancel([ids[index]])
            yield choice, new

    async def _stream(
        self, request: web.Request, answers: Answers, pieces: AsyncIterator[tuple[Choice, str]]
    ) -> web.StreamResponse:
        """Server-sent events: a chunk whenever there is text, and ``[DONE]``."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        try:
            async for choice, new in pieces:
                if new or choice.finish_reason or not choice.is_begun:
                    await response.write(_event(answers.chunk(choice, new)))
            if answers.wanted.include_usage:
                await response.write(_event(answers.usage_chunk()))
            await response.write(b"data: [DONE]\n\n")
        # The status has been sent: what goes wrong from here on is an event.
        except RequestError as error:
            await response.write(_event(_error_object(error)))
        await response.write_eof()
        return response

    def _require_engine(self) -> None:
        if self.streams.failure is not None:
            failure = self.streams.failure
            raise RequestError(f"the engine has failed: {failure}", code="engine_error", status=503)

    @web.middleware
    async def _admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Lets those through who may ask."""
        if self.token is None and not is_loopback(request.url.host or ""):
            # A page on the web whose name was made to mean this machine sends its own name.
            raise RequestError("this server answers to its machine's own names alone", status=403)
        if self.token is not None and request.path != "/health":
            sent = request.headers.get("Authorization", "").removeprefix("Bearer ")
            # A header's bytes that are no UTF-8 have come as surrogates.
            if not hmac.compare_digest(sent.encode(errors="surrogateescape"), self.token.encode()):
                said = "send the server's token: Authorization: Bearer TOKEN"
                raise RequestError(said, code="invalid_api_key", status=401)
        if request.method == "POST" and request.content_type != "application/json":
            raise RequestError("send JSON: Content-Type: application/json", status=415)
        return await handler(request)


async def _read_body(request: web.Request) -> Any:
    """The JSON of a request.

    Raises:
        RequestError: It is none, or has text that no tokenizer reads: half a surrogate pair (``"\\ud800"``).
    """
    try:
        body = await request.json()
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RequestError("the body has half a surrogate pair, which is no character") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {error}") from error
    return body


@web.middleware
async def _with_error_objects(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Everything that is refused comes as OpenAI's error object."""
    try:
        return await handler(request)
    except RequestError as error:
        return web.json_response(_error_object(error), status=error.status)
    except web.HTTPException as error:
        said = RequestError(f"{request.method} {request.path}: {error.reason}", status=error.status)
        return web.json_response(_error_object(said), status=error.status)


def run_server(server: OpenAIServer, listening: socket.socket, tell: Callable[[], None]) -> None:
    """Answers until SIGINT or SIGTERM.

    Args:
        tell: Called when it answers.

    Raises:
        RunError: The engine has failed.
    """
    asyncio.run(_run(server, listening, tell))


def runner_of(server: OpenAIServer, shutdown_timeout: float) -> web.AppRunner:
    """What answers on sockets, without a log of requests; ``shutdown_timeout`` is in seconds."""
    logger = logging.getLogger(__name__)
    logger.addFilter(_say_bad_request_in_a_line)
    options: dict[str, Any] = {"access_log": None, "logger": logger}
    return web.AppRunner(server.app(), handler_cancellation=True, shutdown_timeout=shutdown_timeout, **options)


def _say_bad_request_in_a_line(record: logging.LogRecord) -> bool:
    """A filter: what is no HTTP is the client's fault, and a traceback of the parser's tells nobody anything."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        record.msg, record.args = f"{record.getMessage()}: {error.message.splitlines()[0]}", ()
        record.exc_info = None
    return True


async def _run(server: OpenAIServer, listening: socket.socket, tell: Callable[[], None]) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    runner = runner_of(server, shutdown_timeout=5.0)
    await runner.setup()
    try:
        await web.SockSite(runner, listening).start()
        tell()
        while not stop.is_set() and server.streams.failure is None:
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 0.5)
    finally:
        await runner.cleanup()
    if server.streams.failure is not None:
        failure = server.streams.failure
        raise RunError(f"the engine has failed: {type(failure).__name__}: {failure}") from failure


def _call(loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[Any], item: Any) -> None:
    # A loop that has ended has nobody left who waits.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(pieces.put_nowait, item)


def _event(value: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def _error_object(error: RequestError) -> dict[str, Any]:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}
