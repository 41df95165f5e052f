"""Frames between a RewardServer and its child processes: call id, length, body.

Requests are pickled, for they come from the server. Answers are JSON: what a child says is data, never code.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HEADER = struct.Struct("!QQ")
MAX_ANSWER_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Setup:
    """The first thing a child is told."""

    functions: tuple[tuple[str | None, str | None, Mapping[str, Any], str], ...]
    """Name, plugin, arguments and kind of completions of each reward."""
    parent_pid: int
    memory_bytes: int
    """Limit of the data segment (heap and anonymous memory)."""


@dataclass(frozen=True, slots=True)
class Request:
    """One call of one function."""

    function: int
    prompts: Sequence[Any]
    completions: Sequence[str]
    completion_ids: Sequence[bytes]
    """int32, as bytes: a hundred times cheaper to move than a list."""
    columns: Mapping[str, Sequence[Any]]
    images: Sequence[Sequence[bytes]] = ()
    """Encoded pictures of each row, which the function gets decoded as the column ``images``; none where no row has
    any."""


def frame(call_id: int, body: bytes) -> bytes:
    """Returns the bytes of one frame."""
    return HEADER.pack(call_id, len(body)) + body


def read_frame(connection: socket.socket) -> tuple[int, bytes] | None:
    """Reads one frame from a blocking socket; None at its end."""
    header = _read_exactly(connection, HEADER.size)
    if header is None:
        return None
    call_id, length = HEADER.unpack(header)
    body = _read_exactly(connection, length)
    return None if body is None else (call_id, bytes(body))


def take_frames(buffer: bytearray) -> list[tuple[int, bytes]]:
    """Removes the whole frames at the front of a buffer and returns them.

    Raises:
        ValueError: A frame longer than any honest answer.
    """
    frames = []
    while len(buffer) >= HEADER.size:
        call_id, length = HEADER.unpack_from(buffer)
        if length > MAX_ANSWER_BYTES:
            raise ValueError(f"a frame of {length} bytes")
        end = HEADER.size + length
        if len(buffer) < end:
            break
        frames.append((call_id, bytes(buffer[HEADER.size : end])))
        del buffer[:end]
    return frames


def _read_exactly(connection: socket.socket, length: int) -> bytearray | None:
    body = bytearray()
    while len(body) < length:
        part = connection.recv(min(length - len(body), 1 << 20))
        if not part:
            return None
        body += part
    return body
