"""Python's collector of reference cycles, kept out of the way where everything that is made stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Within it, or within a function that it decorates, no cycles are looked for.

    Importing torch and transformers makes some 370,000 objects that stay; looking through them again and again, in
    vain, is a quarter of its time. Of several threads within it at a time, the first brings the collector back.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
