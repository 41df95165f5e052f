"""What the server answers when it will not do something."""

from __future__ import annotations


class Refusal(Exception):
    """A request that is not carried out: the HTTP status, and one line for the person who asked."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
