"""Room that blocks leave between others is used again by larger ones, and given back when that is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors.host_memory import allocator_environment

PROGRAM = """
from pathlib import Path
import numpy as np
from actors.host_memory import release_freed_memory

def mebibytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(field))

np.ones(16 << 20, np.uint8)
before, kept, freed = mebibytes("VmHWM:"), [], []
for _ in range(32):
    freed.append(np.ones(8 << 20, np.uint8))
    kept.append(np.ones(1 << 16, np.uint8))
freed.clear()
larger = [np.ones(15 << 20, np.uint8) for _ in range(16)]
peak = mebibytes("VmHWM:")
larger.clear()
release_freed_memory()
print(peak - before, mebibytes("VmRSS:") - before)

"""


@pytest.mark.skipif(not allocator_environment(), reason="Ray brings no jemalloc here")
def test_larger_blocks_fit_where_smaller_ones_were_freed():
    def mebibytes(environment: dict[str, str]) -> tuple[int, int]:
        environment = os.environ | environment
        output = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, env=environment)
        at_most, at_last = map(int, output.stdout.split())
        return at_most, at_last

    # 32 blocks of 8 MiB, then 16 of 15 MiB.
    at_most, at_last = mebibytes(allocator_environment())
    assert at_most < 300
    assert at_last < 50
    assert mebibytes({})[0] > 400


def test_it_is_what_ray_ships():
    environment = allocator_environment()
    if environment:
        assert Path(environment["LD_PRELOAD"]).name == "libjemalloc.so"
