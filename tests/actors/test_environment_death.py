"""A worker that is killed with episodes under way leaves no process of an environment behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORKER = """
import asyncio, sys
from rlflow.actors.environment_pool import EnvironmentPool
from rlflow.recipe import EnvironmentBlock

async def play():
    pool = EnvironmentPool(EnvironmentBlock(plugin=sys.argv[1]))
    processes = [await pool.begin() for _ in range(2)]
    for process in processes:
        said = await process.ask(30.0, "reset", {"messages": []}, 0)
        print(said["messages"][0]["content"], process.pid, pool._source._process.pid, flush=True)
    await asyncio.gather(*(process.ask(30.0, "step", {"role": "assistant", "content": ""}) for process in processes))

asyncio.run(play())
"""
ENVIRONMENT = """
import subprocess, time

class Sleeps:
    def reset(self, row):
        self.child = subprocess.Popen(["sleep", "60"])
        return str(self.child.pid)
    def step(self, message):
        time.sleep(60)
"""
GONE_S = 20.0


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.slow
def test_the_processes_of_episodes_and_what_they_started_end_with_a_worker_that_is_killed(tmp_path: Path):
    plugin = tmp_path / "sleeps.py"
    plugin.write_text(ENVIRONMENT)
    worker = subprocess.Popen([sys.executable, "-c", WORKER, f"{plugin}:Sleeps"], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    pids = {int(pid) for line in (worker.stdout.readline(), worker.stdout.readline()) for pid in line.split()}
    try:
        assert len(pids) == 5 and all(is_alive(pid) for pid in pids)
        worker.kill()
        worker.wait(timeout=GONE_S)
        deadline = time.monotonic() + GONE_S
        while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [pid for pid in pids if is_alive(pid)]
    finally:
        for pid in pids:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
