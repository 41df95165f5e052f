"""What happens to rows that have more tokens than the recipe allows."""

from __future__ import annotations

from typing import Any, Literal

from rlflow.data.errors import BadRow, DataError, Rows, listing
from rlflow.data.records import Loaded


class Overlong:
    """Collects the rows beyond a limit, and then does what the recipe says with all of them."""

    def __init__(self, key: str, limit: int, policy: Literal["error", "drop", "truncate"]) -> None:
        self.key = key
        self.limit = limit
        self.policy = policy
        self._rows: list[BadRow] = []

    def leaves_out(self, row: Loaded[Any], num_tokens: int) -> bool:
        """Takes note of an overlong row; False when it is to be cut."""
        if self.policy == "truncate":
            return False
        self._rows.append(row.bad(f"{num_tokens:,} tokens, data.{self.key} is {self.limit:,}"))
        return True

    def settle(self, kept: Rows[Any]) -> None:
        """Adds the rows to ``kept.skipped``.

        Raises:
            DataError: they must not be left out, or no other row is there.
        """
        if self._rows and self.policy == "error":
            raise DataError(
                f"{len(self._rows)} overlong row{'s' if len(self._rows) > 1 else ''}:{listing(self._rows)}\n"
                f"Raise data.{self.key}, or set data.overlong: drop (or truncate)."
            )
        kept.skipped.extend(self._rows)
        if not kept:
            raise DataError(f"no row is left:{listing(kept.skipped)}\nRaise data.{self.key}.")
