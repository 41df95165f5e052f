"""What goes between a rollout worker and its environments' processes; the frames are reward_wire's.

    worker --"begin" + a socket--> source --fork--> the process of one episode, at the other end of the socket
    worker --"end", pid----------> source: kills that process and what it started, and waits for it
    worker --verb, arguments-----> episode --answer-->

Requests are pickled, for they come from the worker. Answers are JSON: what a child says is data, never code.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlflow.actors.reward_wire import HEADER

MAX_ANSWER_BYTES = 1 << 20
"""Of one answer of an episode's environment."""
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class EnvironmentSetup:
    """The first thing that the process is told which episodes start from."""

    name: str | None
    plugin: str | None
    tools: tuple[str, ...]
    args: Mapping[str, Any]
    parent_pid: int
    memory_bytes: int
    """Limit of an episode's data segment (heap and anonymous memory)."""


def decoded(body: bytes) -> Any:
    """What an answer says. A lone surrogate, which no tokenizer and no file takes, is U+FFFD in it.

    Raises:
        ValueError: It is no JSON, or nested too deeply.
    """
    text = body.decode("utf-8", "replace")
    try:
        said = json.loads(text)
        return _without_surrogates(said) if "\\u" in text else said
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return [_without_surrogates(item) for item in value] if isinstance(value, list) else value


def read_with_descriptor(connection: socket.socket) -> tuple[int, bytes, int | None] | None:
    """Reads one frame, and the descriptor that came with it, from a blocking socket; None at its end."""
    header, descriptors, _, _ = socket.recv_fds(connection, HEADER.size, 1)
    while header and len(header) < HEADER.size:
        part = connection.recv(HEADER.size - len(header))
        if not part:
            return None
        header += part
    if not header:
        return None
    call_id, length = HEADER.unpack(header)
    body = b""
    while len(body) < length:
        part = connection.recv(length - len(body))
        if not part:
            return None
        body += part
    return call_id, body, descriptors[0] if descriptors else None
