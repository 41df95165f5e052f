"""Directories with runs in them, and a server of one that is asked without a network."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from rlflow.driver.run_lock import LOCK, Holder
from rlflow.ui.server import Settings, make_app

CHANGE = {"X-Rlflow": "1"}
FAKE_RLFLOW = Path(__file__).with_name("fake_rlflow.py")

Client = TestClient[web.Request, web.Application]


def write_run(directory: Path, steps: int, *, of: int = 100, key: str = "reward/mean") -> Path:
    """A run of ``steps`` steps of which each took 2 s; the metric is a tenth of the step's number."""
    directory.mkdir(parents=True, exist_ok=True)
    begun = time.time() - 2 * steps
    rows = [{"step": n, "time": begun + 2 * n, key: n / 10, "time/step_s": 2.0} for n in range(1, steps + 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"algorithm": {"name": "grpo"}, "model": {"path": "tiny"}, "run": {"steps": of}}
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return directory


def write_lock(directory: Path, pid: int, *, began: str | None = None) -> None:
    """As a process that has a run's directory leaves it there."""
    holder = Holder.of_process(pid)
    said = {"host": holder.host, "pid": pid, "began": began or holder.began, "since": "2026-01-01 00:00:00"}
    (directory / LOCK).write_text(json.dumps(said) + "\n")


def ask(home: Path, talk: Callable[[Client], Awaitable[Any]], *, chats: Any = None, **settings: Any) -> Any:
    """Calls ``talk`` with a client of a server of home's runs/, whose runs are `fake_rlflow.py`."""

    async def asking() -> Any:
        program = (sys.executable, str(FAKE_RLFLOW))
        app = make_app(Settings(**{"directory": home / "runs", "here": home, "program": program, **settings}), chats)
        async with TestClient(TestServer(app)) as client:
            return await talk(client)

    return asyncio.run(asking())


async def until(condition: Callable[[], Awaitable[Any]], seconds: float = 20.0) -> Any:
    """Waits for the first true answer."""
    deadline = time.monotonic() + seconds
    while not (answer := await condition()):
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(0.05)
    return answer
