"""A connection between a trainer's rank and a rollout worker: short JSON messages, each answered within a deadline."""

from __future__ import annotations

import json
import socket
import struct
from collections import deque
from contextlib import suppress
from typing import Any

ANSWER_S = 60.0
"""Who says nothing for so long in the middle of a transfer is lost."""
_LENGTH = struct.Struct(">I")
_LONGEST = 1 << 26


class Line:
    """One end. Nothing that comes is code: JSON alone is read."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self.outstanding: deque[int] = deque()
        """Buffers with chunks that the other end has not answered, the oldest first."""
        self.is_proven = False
        """A whole version has come through."""

    def say(self, kind: str, **what: Any) -> None:
        """Raises ConnectionError when the other end is gone."""
        said = json.dumps({"kind": kind, **what}).encode()
        try:
            self._connection.settimeout(ANSWER_S)
            self._connection.sendall(_LENGTH.pack(len(said)) + said)
        except OSError as error:
            raise ConnectionError(f"the other end takes nothing: {error}") from error

    def hear(self, *kinds: str, timeout_s: float | None = ANSWER_S) -> dict[str, Any]:
        """The next message.

        Args:
            kinds: Those that may come.
            timeout_s: None waits for as long as the connection is there.

        Raises:
            ConnectionError: None came, or another kind, among them an ``error`` with what the other end says of it.
        """
        try:
            self._connection.settimeout(timeout_s)
            (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
            if length > _LONGEST:
                raise ConnectionError(f"a message of {length} bytes")
            message = json.loads(self._read(length))
        except TimeoutError as error:
            raise ConnectionError(f"no answer within {timeout_s:g} s") from error
        except (OSError, ValueError) as error:
            raise ConnectionError(str(error)) from error
        if message["kind"] not in kinds:
            raise ConnectionError(message.get("reason", f"{message['kind']!r} came, not {' or '.join(kinds)}"))
        return message

    @property
    def is_gone(self) -> bool:
        """Whether the other end has been closed, as far as it is known here."""
        try:
            self._connection.settimeout(0)
            return not self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        # A thread that reads from it hears of its end; it may be there already.
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _read(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = self._connection.recv(size - len(parts))
            if not part:
                raise ConnectionError("the other end is gone")
            parts += part
        return bytes(parts)
