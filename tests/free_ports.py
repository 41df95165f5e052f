"""Ports for servers that listen a while after a test has chosen where."""

from __future__ import annotations

import random
import socket

_BELOW_EPHEMERAL = range(20_000, 32_000)
"""The system gives none of them to a connection on its way out, which would take it before the server is there."""


def free_ports(count: int) -> list[int]:
    """Different ports of loopback that nobody listens on."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().choice(_BELOW_EPHEMERAL)
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports += [port] if port not in ports else []
    return ports


def free_address() -> str:
    """``host:port`` on loopback."""
    return f"127.0.0.1:{free_ports(1)[0]}"
