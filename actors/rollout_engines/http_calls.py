"""Calls to a server that may be busy, restarting or gone: JSON in, JSON out, each with a deadline."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

ATTEMPTS = 6
FIRST_PAUSE_S = 0.25
"""Before the second attempt; each pause is twice the one before it, 8 seconds in all."""
KEY_VARIABLE = "RLFLOW_SERVER_API_KEY"
_SHOWN = 500


class ServerError(RuntimeError):
    """A server that did not do what it was asked: which, what it said, and what to do."""

    def __init__(self, message: str, status: int | None = None) -> None:
        """status: of HTTP, where the server refused."""
        super().__init__(message)
        self.status = status


@contextmanager
def taking_apart(answer: Any, where: str) -> Iterator[None]:
    """Within, an answer's fields are read.

    Raises:
        ServerError: They are not where they are looked for, or hold something else.
    """
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        shown = json.dumps(answer)[:_SHOWN]
        raise ServerError(
            f"{where}: it answered in a form that is not known here ({type(error).__name__}: {error}): {shown}. Is it "
            "the server that is meant?"
        ) from error


@dataclass(frozen=True, slots=True)
class Server:
    """One server, asked directly, whatever proxies the environment names."""

    url: str
    """Without a slash at its end."""
    timeout_s: float
    """Longest wait for an answer."""
    timeout_key: str = "rollout_server.timeout_s"
    """Of the recipe: what to raise where it takes longer."""
    url_key: str = "rollout_server.urls"

    def get(self, path: str) -> Any:
        return self._call("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Tries again, with growing pauses, when the connection is lost or refused and when the server says that the
        fault is its own (5xx) or that it is busy (429).

        Raises:
            ServerError: It kept failing, refused the call, or gave no answer in time.
        """
        return self._call("POST", path, json.dumps(body).encode())

    def _call(self, method: str, path: str, data: bytes | None) -> Any:
        where, failure = f"{method} {self.url}{path}", ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
            try:
                return self._ask(method, path, data, where)
            except HTTPError as error:
                said = error.read()[:_SHOWN].decode(errors="replace").strip()
                failure = f"it answered {error.code} {error.reason}: {said}"
                if error.code < 500 and error.code != http.client.TOO_MANY_REQUESTS:
                    raise ServerError(f"{where}: {failure}", error.code) from error
            except (URLError, OSError, http.client.HTTPException) as error:
                cause = error.reason if isinstance(error, URLError) else error
                if isinstance(cause, TimeoutError):
                    raise ServerError(
                        f"{where}: no answer within {self.timeout_s:g} s: raise {self.timeout_key}, or look at "
                        "what the server is doing"
                    ) from error
                failure = f"{type(cause).__name__}: {cause}"
        raise ServerError(
            f"{where}: {ATTEMPTS} attempts failed, the last because {failure}. Is the server up, and is "
            f"{self.url_key} right?"
        )

    def _ask(self, method: str, path: str, data: bytes | None, where: str) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = Request(f"{self.url}{path}", data, headers, method=method)
        with build_opener(ProxyHandler({})).open(request, timeout=self.timeout_s) as answer:
            text = answer.read()
        try:
            return json.loads(text) if text.strip() else {}
        except ValueError as error:
            shown = text[:_SHOWN].decode(errors="replace")
            raise ServerError(f"{where}: it answered with what is no JSON: {shown}") from error
