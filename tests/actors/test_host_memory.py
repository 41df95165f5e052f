"""Room that blocks leave between others is used again by larger ones, and given back when that is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlflow.actors.host_memory import allocator_environment

PROGRAM = """
from pathlib import Path
import numpy as np
from rlflow.actors.host_memory import release_freed_memory

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


@pytest.mark.slow
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


KEEPING = """
from pathlib import Path
import numpy as np
from rlflow.actors.host_memory import keep_freed_memory, release_freed_memory

def mebibytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS:"))

keep_freed_memory()
before = mebibytes()
for _ in range(200):
    blocks = [np.ones(4 << 20, np.uint8) for _ in range(16)]
    del blocks
kept = mebibytes() - before
release_freed_memory()
print(kept, mebibytes() - before)
"""


@pytest.mark.skipif(not allocator_environment(), reason="Ray brings no jemalloc here")
def test_freed_memory_is_kept_where_that_is_asked_for_until_it_is_released():
    output = subprocess.run(
        [sys.executable, "-c", KEEPING], check=True, capture_output=True, env=os.environ | allocator_environment()
    )
    kept, at_last = map(int, output.stdout.split())
    # 16 blocks of 4 MiB.
    assert 60 <= kept <= 80
    assert at_last < 8


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_ray_ships_it_and_what_a_user_preloads_stays(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/own.so")
    monkeypatch.setenv("MALLOC_CONF", "narenas:2")
    environment = allocator_environment()
    library, own = environment["LD_PRELOAD"].split(":")
    assert Path(library).name == "libjemalloc.so" and own == "/usr/lib/own.so"
    assert environment["MALLOC_CONF"] == "narenas:2"
