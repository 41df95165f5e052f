"""Where a server listens, and who may speak to it."""

from __future__ import annotations

import errno
import ipaddress
import secrets
import socket

from rlflow.data.errors import DataError
from rlflow.driver.errors import RunError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def token_for(host: str, given: str | None) -> str | None:
    """The token that clients must send: the one that is given, or a new one where other machines reach the host.

    Raises:
        DataError: The one that is given is empty, as of a variable that is not set: it would let everybody in.
    """
    if given is not None and not given.strip():
        raise DataError("--token is empty: give one, or leave it out")
    if given is not None or is_loopback(host):
        return given
    return secrets.token_urlsafe(24)


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens; with port 0 at a free one.

    Raises:
        RunError: The port is in use, or is not for this user.
        DataError: The host is none of this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, OverflowError) as error:
        raise DataError(f"--host {host}, --port {port}: {error}: give an address of this machine") from error
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise RunError(
                f"port {port} of {host} is in use: name another with --port, or --port 0 for a free one"
            ) from error
        if error.errno == errno.EACCES:
            raise RunError(f"port {port} is not for this user: name one above 1023 with --port") from error
        raise DataError(f"--host {host}: {error.strerror}: give an address of this machine") from error
    return listening


def url_of(host: str, port: int) -> str:
    """Where a client of this machine finds it."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
