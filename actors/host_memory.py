"""How the processes that hold models give memory back to the system."""

from __future__ import annotations

import ctypes
import platform

_M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h."""
_LEAST_MAPPED = 1 << 20
"""Bytes of a block that gets a mapping of its own."""


def return_freed_memory() -> None:
    """From now on a freed tensor's memory is the system's again, where the C library is glibc.

    glibc keeps freed blocks of up to 32 MiB in its heap: its mmap threshold follows the blocks that are freed. What is
    made between activations then leaves holes into which nothing fits, a third of a trainer's memory and more
    (benchmarks/memory.md). A fixed threshold gives every large block a mapping of its own, as larger ones have anyway,
    at the price of fresh pages.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LEAST_MAPPED)
