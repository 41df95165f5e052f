"""The allocator of processes that hold models on CPUs."""

from __future__ import annotations

import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path

_OPTIONS = ("oversize_threshold:0", "narenas:1")
"""Freed blocks of over 8 MiB are kept for some seconds too, and where all threads find them."""
_ALL_ARENAS = 4096
"""Of jemalloc.h."""


def allocator_environment() -> dict[str, str]:
    """Environment of a process whose tensors shall be allocated by jemalloc; empty where Ray brings none.

    glibc keeps freed blocks of up to 32 MiB in its heap, and what is made between activations leaves holes there into
    which nothing fits: a trainer needs a fifth more memory, or twice as much (benchmarks/memory.md). jemalloc, which
    comes with Ray for its own processes, joins them again, and is as fast.
    """
    ray = find_spec("ray")
    if sys.platform != "linux" or ray is None or ray.origin is None:
        return {}
    library = Path(ray.origin).parent / "core" / "libjemalloc.so"
    return {"LD_PRELOAD": str(library), "MALLOC_CONF": ",".join(_OPTIONS)} if library.is_file() else {}


def release_freed_memory() -> None:
    """Gives what jemalloc keeps for the next step back to the system; does nothing where glibc allocates.

    Raises:
        OSError: jemalloc knows no such request.
    """
    control = getattr(ctypes.CDLL(None), "mallctl", None)
    if control is None:
        return
    request = f"arena.{_ALL_ARENAS}.purge"
    if error := control(request.encode(), None, None, None, ctypes.c_size_t(0)):
        raise OSError(error, f"jemalloc: {request}")
