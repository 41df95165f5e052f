"""Who may ask the server for something: everything that a request must have before it reaches a handler.

A page of another site, open in the same browser, can send requests here. It cannot choose the Host header (so a name
that was pointed at this address, DNS rebinding, is refused), cannot set a header of its own without being asked first
(so every call that changes something must have one), and cannot read an answer.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Middleware

from rlflow.ui.refusal import Refusal

HEADER = "X-Rlflow"
"""Every call that changes something has it; another site's page cannot set it."""
SHORTEST_TOKEN = 16
"""Characters of a token that a user chooses."""
COOKIE_SECONDS = 30 * 24 * 3600
_OPEN = ("/static/", "/login")
"""What is shown without a token: the page that asks for it."""
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_token() -> str:
    """A token of 192 random bits."""
    return secrets.token_urlsafe(24)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address of that name."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class Guard:
    """Lets requests in, or refuses them.

    Args:
        host: The address that the server listens on, as the user named it.
        names: Further names under which browsers reach it, behind a proxy say.
        token: What every request must bring, as a cookie or a header; None asks for none.
    """

    def __init__(self, host: str, names: tuple[str, ...] = (), token: str | None = None) -> None:
        self.token = token
        self._names = {name.lower() for name in (host, *names, "localhost", socket.gethostname(), socket.getfqdn())}
        self._cookie = f"rlflow_ui_{secrets.token_hex(4)}"
        """Its own for each server: browsers send cookies to every port of a host."""

    @property
    def middleware(self) -> Middleware:
        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            try:
                self._check_host(request)
                if request.method not in ("GET", "HEAD"):
                    self._check_change(request)
                is_link = request.path == "/" and "token" in request.query
                if is_link or not (request.path.startswith(_OPEN) or self._has_token(request)):
                    return self._ask_for_token(request)
                return await handler(request)
            except Refusal as refusal:
                return web.json_response({"error": str(refusal)}, status=refusal.status)

        return guard

    async def log_in(self, request: web.Request) -> web.Response:
        """Answers a token with the cookie that stands for it from then on."""
        try:
            body = await request.json()
        except (ValueError, RecursionError, LookupError):
            raise Refusal(400, "the body is not JSON") from None
        given = body.get("token") if isinstance(body, dict) else None
        if not isinstance(given, str) or not self._is_token(given):
            raise Refusal(401, "that is not the token: `rlflow ui` printed it when it started")
        response = web.json_response({})
        self._set_cookie(request, response)
        return response

    def _check_host(self, request: web.Request) -> None:
        """Only names that nobody else can point here; an address as such cannot be another's name."""
        host = request.headers.get("Host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            raise Refusal(400, f"{host[:100]!r} is no name of a host") from None
        if name.lower() in self._names or name.endswith(".localhost"):
            return
        try:
            ipaddress.ip_address(name)
        except ValueError:
            raise Refusal(403, f"this server is not called {name[:100]}: start it with --allow-host NAME") from None

    def _check_change(self, request: web.Request) -> None:
        """Of a call that changes something: it comes from this server's own page, or from a program."""
        if request.method != "POST":
            raise Refusal(405, "only GET and POST are answered")
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2].lower() != request.headers.get("Host", "").lower():
            raise Refusal(403, f"calls from a page of {origin[:100]} are refused")
        if request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            raise Refusal(403, "calls from another site's page are refused")
        if HEADER not in request.headers:
            raise Refusal(403, f"the header {HEADER} is missing: set it to 1")
        if request.content_type != "application/json":
            raise Refusal(415, "the body must be JSON, with Content-Type: application/json")

    def _has_token(self, request: web.Request) -> bool:
        if self.token is None:
            return True
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_token(given.strip()):
            return True
        return self._is_token(request.cookies.get(self._cookie, ""))

    def _is_token(self, given: str) -> bool:
        """Takes the same time whatever is given."""
        return self.token is not None and hmac.compare_digest(given.encode(errors="replace"), self.token.encode())

    def _ask_for_token(self, request: web.Request) -> web.Response:
        """The page that asks for it; a link that has it gets the cookie, and leaves it out of the history."""
        if request.path == "/":
            if self.token is None:
                return web.Response(status=303, headers={"Location": "/"})
            if self._is_token(request.query.get("token", "")):
                response = web.Response(status=303, headers={"Location": "/"})
                self._set_cookie(request, response)
                return response
            return web.Response(status=303, headers={"Location": "/login"})
        raise Refusal(401, "a token is needed: Authorization: Bearer TOKEN, or open the link that `rlflow ui` printed")

    def _set_cookie(self, request: web.Request, response: web.Response) -> None:
        assert self.token is not None
        is_secure = request.headers.get("X-Forwarded-Proto", request.scheme) == "https"
        response.set_cookie(
            self._cookie, self.token, max_age=COOKIE_SECONDS, httponly=True, samesite="Strict", secure=is_secure
        )


async def set_headers(_request: web.Request, response: web.StreamResponse) -> None:
    """What every answer tells the browser: run nothing but this server's own scripts, show it in no frame."""
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.setdefault("Cache-Control", "no-cache")
