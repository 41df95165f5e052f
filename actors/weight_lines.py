"""A connection between a trainer's rank and a rollout worker: short JSON messages, each answered within a deadline."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections import deque
from contextlib import suppress
from typing import Any

ANSWER_S = 60.0
"""Who says nothing for so long in the middle of a transfer is lost."""
LOOPBACK = "127.0.0.1"
_LENGTH = struct.Struct(">I")
_LONGEST = 1 << 26


def listening_at(host: str) -> socket.socket:
    """A socket that takes connections to that address of this machine, and to no other, at some port.

    Raises:
        OSError: No interface has it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, 0), family=family)
    except OSError as error:
        raise OSError(
            f"cannot listen at {host}, which Ray has as this node's address: {error.strerror or error}. Give the node "
            "one of its interfaces' with ray start --node-ip-address"
        ) from error


class Line:
    """One end. Nothing that comes is code: JSON alone is read."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self.outstanding: deque[int] = deque()
        """Buffers with chunks that the other end has not answered, the oldest first."""
        self.is_proven = False
        """A whole version has come through."""
        self.device = ""
        """The other end's, as it has greeted."""

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
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            (length,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline))
            if length > _LONGEST:
                raise ConnectionError(f"a message of {length} bytes")
            message = json.loads(self._read(length, deadline))
        except TimeoutError as error:
            raise ConnectionError(f"no answer within {timeout_s:g} s") from error
        # Brackets within brackets, thousands deep, are a RecursionError.
        except (OSError, ValueError, RecursionError) as error:
            raise ConnectionError(str(error)) from error
        if not isinstance(message, dict):
            raise ConnectionError(f"{type(message).__name__} came, which is no message")
        if message.get("kind") not in kinds:
            came = repr(message.get("kind"))[:100]
            raise ConnectionError(str(message.get("reason", f"{came} came, not {' or '.join(kinds)}")))
        return message

    def has_message(self, longest: int) -> bool:
        """Whether the next message is here to its end. Waits for nothing.

        Args:
            longest: Bytes that it may have.

        Raises:
            ConnectionError: The other end is gone, or says something longer.
        """
        try:
            self._connection.settimeout(0)
            seen = self._connection.recv(_LENGTH.size + longest, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ConnectionError(str(error)) from error
        if not seen:
            raise ConnectionError("the other end is gone")
        if len(seen) < _LENGTH.size:
            return False
        (length,) = _LENGTH.unpack_from(seen)
        if length > longest:
            raise ConnectionError(f"a message of {length} bytes")
        return len(seen) >= _LENGTH.size + length

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

    def _read(self, size: int, deadline: float | None) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            # One for all of it: who sends a byte now and then is waited for no longer.
            self._connection.settimeout(None if deadline is None else max(deadline - time.monotonic(), 1e-6))
            part = self._connection.recv(size - len(parts))
            if not part:
                raise ConnectionError("the other end is gone")
            parts += part
        return bytes(parts)
