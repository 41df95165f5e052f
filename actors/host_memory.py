"""The allocator of processes that train on CPUs."""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.util import find_spec
from pathlib import Path

_OPTIONS = ("oversize_threshold:0", "narenas:1")
"""Freed blocks of over 8 MiB are kept for a while too, and where all threads find them."""
_ALL_ARENAS, _ONLY_ARENA = 4096, 0
"""The first is jemalloc.h's word for all of them."""


def allocator_environment() -> dict[str, str]:
    """Environment of a process whose tensors shall be allocated by jemalloc; empty where Ray brings none.

    glibc keeps freed blocks of up to 32 MiB in its heap, and what is made between activations leaves holes there into
    which nothing fits: a trainer needs a fifth more memory, or nearly twice as much (benchmarks/memory.md). jemalloc,
    which comes with Ray for its own processes, joins them again, and is about as fast.
    """
    ray = find_spec("ray")
    if sys.platform != "linux" or ray is None or ray.origin is None:
        return {}
    library = Path(ray.origin).parent / "core" / "libjemalloc.so"
    if not library.is_file():
        return {}
    preloaded = [name for name in (str(library), os.environ.get("LD_PRELOAD")) if name]
    return {"LD_PRELOAD": ":".join(preloaded), "MALLOC_CONF": os.environ.get("MALLOC_CONF") or ",".join(_OPTIONS)}


def keep_freed_memory() -> None:
    """From now on only `release_freed_memory` gives memory back: a step finds what the one before it used.

    By itself jemalloc gives pages back within a second where use rises and falls. To fault them in again takes a fifth
    of a small model's step; a large one needs the holes that giving back closes.
    """
    _control(f"arena.{_ONLY_ARENA}.dirty_decay_ms", ctypes.c_ssize_t(-1))


def release_freed_memory() -> None:
    """Gives what jemalloc keeps for the next step back to the system; does nothing where glibc allocates."""
    _control(f"arena.{_ALL_ARENAS}.purge", None)


def _control(name: str, value: ctypes.c_ssize_t | None) -> None:
    """
    Raises:
        OSError: jemalloc knows no such name.
    """
    control = getattr(ctypes.CDLL(None), "mallctl", None)
    if control is None:
        return
    new, size = (None, 0) if value is None else (ctypes.byref(value), ctypes.sizeof(value))
    if error := control(name.encode(), None, None, new, ctypes.c_size_t(size)):
        raise OSError(error, f"jemalloc: {name}")
