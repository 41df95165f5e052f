"""The server: routes, the page's files, and its life from the first request to the last."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from rlflow import tracking
from rlflow.driver.errors import RunError
from rlflow.recipe.packaged import packaged_recipes
from rlflow.recipe.yaml_source import MAX_BYTES
from rlflow.tracking import charts
from rlflow.ui.api import Api, readable
from rlflow.ui.chat import Chats
from rlflow.ui.commands import RLFLOW, Commands, state_directory
from rlflow.ui.guard import Guard, Handler, set_headers
from rlflow.ui.recipes import Recipes
from rlflow.ui.served import Served

STATIC = Path(__file__).with_name("static")
SHARED = Path(tracking.__file__).with_name("page")
"""Charts and episodes, which the report's page has too."""
MAX_BODY = 2 * MAX_BYTES
"""Bytes of a request: a recipe of the largest size, as JSON."""
CLOSING_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What `rlflow ui` was asked for."""

    directory: Path
    host: str = "127.0.0.1"
    port: int = 0
    names: tuple[str, ...] = ()
    """Further names that browsers reach the server by."""
    token: str | None = None
    here: Path = Path()
    """Where runs are started from; its recipes/ are offered."""
    program: tuple[str, ...] = RLFLOW
    """What `run` and its arguments are given to."""


def make_app(settings: Settings, chats: Chats | None = None) -> web.Application:
    """The application, which ends the model that it loaded when it is shut down; runs that it started go on.

    Raises:
        OSError: The directory is not there.
        DataError: Nobody says where to keep what is started.
    """
    served, here = Served(settings.directory), settings.here.resolve()
    guard = Guard(settings.host, settings.names, settings.token)
    packaged = list(packaged_recipes().values())
    recipes = Recipes([served.root / "recipes", here / "recipes"], here, packaged)
    commands = Commands(state_directory(served.root), served, here, settings.program)
    chats = chats or Chats()
    api = Api(served, recipes, commands, chats)
    app = web.Application(client_max_size=MAX_BODY, middlewares=[guard.middleware])
    app.add_routes(
        [
            *[web.RouteDef(route.method, route.path, readable(route.handler), {}) for route in api.routes()],
            web.post("/login", guard.log_in),
            web.get("/login", _page("login.html")),
            web.get("/", _page("index.html")),
            web.get("/static/shared/page.css", _style),
            web.static("/static/shared", SHARED),
            web.static("/static", STATIC),
        ]
    )
    app.on_response_prepare.append(set_headers)

    async def closing(_app: web.Application) -> AsyncIterator[None]:
        yield
        await chats.close()

    app.cleanup_ctx.append(closing)
    app[COMMANDS] = commands
    return app


COMMANDS: web.AppKey[Commands] = web.AppKey("commands", Commands)


async def serve(settings: Settings, tell: Callable[[str], None]) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        tell: Is given the address, and what goes on without the server.

    Raises:
        RunError: The port cannot be had.
    """
    app = make_app(settings)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=CLOSING_SECONDS)
    await runner.setup()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        try:
            await web.TCPSite(runner, settings.host, settings.port).start()
        except OSError as error:
            raise RunError(_port_problem(settings, error)) from error
        tell(address(settings, runner.addresses))
        await stop.wait()
        for command in app[COMMANDS].running():
            tell(f"goes on: rlflow {' '.join(command.arguments)} (process {command.pid})")
    finally:
        await runner.cleanup()


def address(settings: Settings, addresses: Sequence[tuple]) -> str:
    """The link to open."""
    port = addresses[0][1]
    name = socket.gethostname() if settings.host in ("0.0.0.0", "::") else settings.host
    host = f"[{name}]" if ":" in name else name
    secret = "" if settings.token is None else f"?token={settings.token}"
    return f"http://{host}:{port}/{secret}"


def _port_problem(settings: Settings, error: OSError) -> str:
    place = f"port {settings.port} of {settings.host}"
    if error.errno == errno.EADDRINUSE:
        return f"{place} is in use: name another with --port, or --port 0 for one that is free"
    if error.errno == errno.EACCES:
        return f"{place} may not be used by this user: name one above 1023 with --port"
    return f"{place} cannot be listened on ({error.strerror or error}): look at --host and --port"


async def _style(_request: web.Request) -> web.Response:
    return web.Response(text=charts.style_sheet(), content_type="text/css")


def _page(name: str) -> Handler:
    async def page(_request: web.Request) -> web.FileResponse:
        return web.FileResponse(STATIC / name)

    return page
