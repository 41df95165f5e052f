"""Freed blocks go back to the system although others were made between them."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from actors.host_memory import return_freed_memory

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS:"))

if sys.argv[1] == "returned":
    return_freed_memory()
np.ones(16 << 20, np.uint8)
before, kept, freed = resident(), [], []
for _ in range(32):
    freed.append(np.ones(8 << 20, np.uint8))
    kept.append(np.ones(1 << 10, np.uint8))
freed.clear()
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="glibc on Linux only")
def test_blocks_between_which_others_live_are_returned_when_they_are_freed():
    def mebibytes(way: str) -> int:
        return int(subprocess.run([sys.executable, "-c", PROGRAM, way], check=True, capture_output=True).stdout)

    # 32 blocks of 8 MiB were freed.
    assert mebibytes("returned") < 16
    assert mebibytes("as it is") > 128
