"""The order in which rows are trained: a function of seed and epoch alone, so that a resumed run continues it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from rlflow.data.errors import DataError


def permutation(num_rows: int, seed: int, stream: str) -> np.ndarray:
    """A shuffled ``range(num_rows)``: int64 [num_rows].

    It sorts raw Philox output (Salmon et al. 2011), whose stream numpy guarantees across its versions, which it does
    not for ``Generator.permutation``.

    Args:
        num_rows: how many.
        seed: the run's.
        stream: what the order is for; different streams of one seed are independent.
    """
    key = np.frombuffer(hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=16).digest(), dtype="<u8")
    return np.argsort(np.random.Philox(key=key).random_raw(num_rows), kind="stable")


class Sampler:
    """Walks the rows epoch after epoch, and can be put back to where it was."""

    def __init__(self, num_rows: int, seed: int, shuffle: bool = True) -> None:
        if num_rows < 1:
            raise DataError("there are no rows to sample from")
        self.num_rows = num_rows
        self.seed = seed
        self.shuffle = shuffle
        self._taken = 0
        self._epoch = -1
        self._order = np.arange(num_rows)

    def take(self, n: int) -> list[tuple[int, int]]:
        """The next n rows as (epoch from 0, index); an epoch that ends is followed by the next one."""
        rows = []
        for position in range(self._taken, self._taken + n):
            epoch, place = divmod(position, self.num_rows)
            rows.append((epoch, int(self._order_of(epoch)[place])))
        self._taken += n
        return rows

    def state(self) -> dict[str, int | bool]:
        """Where the sampler is, as JSON can hold it."""
        return {"num_rows": self.num_rows, "seed": self.seed, "shuffle": self.shuffle, "taken": self._taken}

    def restore(self, state: Mapping[str, int | bool]) -> None:
        """Continues where ``state()`` was called.

        Raises:
            DataError: the state is of other data or another seed, so the order would not be the one it continues.
        """
        mine = self.state()
        changed = [
            f"{key} was {state[key]}, is {mine[key]}"
            for key in ("num_rows", "seed", "shuffle")
            if state[key] != mine[key]
        ]
        if changed:
            raise DataError(
                f"the checkpoint's data order cannot be continued: {'; '.join(changed)}. "
                "Resume with the data and the seed of the run that wrote it."
            )
        self._taken = int(state["taken"])

    def _order_of(self, epoch: int) -> np.ndarray:
        if self.shuffle and epoch != self._epoch:
            self._order = permutation(self.num_rows, self.seed, f"epoch {epoch}")
            self._epoch = epoch
        return self._order
