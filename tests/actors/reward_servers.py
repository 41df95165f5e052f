"""What tests of the reward server share: a plugin that misbehaves in every way, rows to score, processes to watch."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np

from rlflow.rewards.score_batch import GroupTexts
from rlflow.types import Prompt

PLUGIN = """
import asyncio, math, os, signal, sys, time

def _score(text):
    if text == "raise": raise RuntimeError("boom")
    if text == "nan": return math.nan
    if text == "inf": return math.inf
    if text == "none": return None
    if text == "str": return "1.0"
    if text == "huge": return 10**400
    if text == "too large for float32": return 1e300
    if text == "bool": return True
    if text == "hang": time.sleep(600)
    if text == "hang busily":
        while True: pass
    if text == "exit": os._exit(3)
    if text == "sys.exit": sys.exit("bye")
    if text == "last words":
        print("the disk is on fire", flush=True)
        os._exit(4)
    if text == "print": print("x" * 100_000_000)
    if text == "allocate": return float(len(bytearray(2 * 2**30)))
    if text == "segfault": os.kill(os.getpid(), signal.SIGSEGV)
    if text == "close everything": os.closerange(3, 100)
    if text == "garbage":
        for descriptor in range(3, 100):
            try: os.write(descriptor, b"\\xff" * 64)
            except OSError: pass
    if text == "fork and hang":
        if os.fork() == 0: time.sleep(600)
        time.sleep(600)
    if text == "fork and return": os.fork()
    return float(len(text))

def length(completions, **columns): return [_score(text) for text in completions]
def not_a_list(completions, **columns): return 1.0
async def later(completions, **columns):
    async def one(text):
        await asyncio.sleep(0.2)
        return _score(text)
    return await asyncio.gather(*map(one, completions))
def hangs_always(completions, note, **columns):
    open(note, "a").write(".")
    time.sleep(600)
def rows_of_call(completions, note=None, **columns):
    return [float(f"{len(completions)}.{len(set(note))}") for _ in completions]
def numpy_scores(completions, **columns):
    import numpy as np
    return np.array([_score(text) for text in completions], np.float32)
def arguments(prompts, completions, completion_ids, level):
    return [100 * level[i] + 10 * len(prompts[i]) + sum(completion_ids[i]) for i in range(len(completions))]
"""


def batch(groups: list[list[str]], **columns: Any) -> tuple[list[GroupTexts]]:
    """What `score` takes. Rollout r has the token ids r, r, r."""
    row = itertools.count()
    return (
        [
            GroupTexts(
                Prompt(
                    id=f"set:{index}",
                    token_ids=np.zeros(2, np.int32),
                    messages=[{"role": "user", "content": "?"}],
                    columns={name: values[index] for name, values in columns.items()},
                ),
                tuple(texts),
                tuple(np.full(3, next(row), dtype=np.int32).tobytes() for _ in texts),
            )
            for index, texts in enumerate(groups)
        ],
    )


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_dead(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"{pids} live on"
        time.sleep(0.02)
