"""A model to talk to: loaded when asked for, streamed through this server, ended when nobody needs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from ui_server import CHANGE, Client, ask, until, write_run

from rlflow.ui.chat import Chats, serve_command

FAKE_SERVE = Path(__file__).with_name("fake_serve.py")


def fake(directory: Path, checkpoint: str | None) -> Sequence[str]:
    return [sys.executable, str(FAKE_SERVE), str(directory), str(checkpoint)]


def has_ended(chats: Chats) -> Callable[[], Awaitable[bool]]:
    async def ended() -> bool:
        return chats.server is not None and chats.server.state == "ended"

    return ended


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def opened(client: Client, run: str, checkpoint: str | None = None) -> dict[str, Any]:
    body = {"run": run, "checkpoint": checkpoint}
    async with client.post("/api/chat/open", json=body, headers=CHANGE) as response:
        assert response.status == 200, await response.text()

    async def ready() -> Any:
        async with client.get("/api/chat", params={"run": run}) as response:
            chat = await response.json()
        return chat if chat["state"] != "starting" else None

    return await until(ready)


async def said(client: Client, run: str, text: str, **options: Any) -> tuple[int, str]:
    body = {"run": run, "messages": [{"role": "user", "content": text}], **options}
    async with client.post("/api/chat/completions", json=body, headers=CHANGE) as response:
        data = await response.text()
        if response.status != 200:
            return response.status, json.loads(data)["error"]
        assert response.content_type == "text/event-stream" and data.endswith("data: [DONE]\n\n")
        pieces = [json.loads(line[6:]) for line in data.splitlines() if line.startswith("data: {")]
        return 200, "".join(piece["choices"][0]["delta"]["content"] for piece in pieces)


def test_a_model_answers_through_this_server_and_ends_with_it(home: Path):
    write_run(home / "runs" / "a", 1)
    chats = Chats(fake)

    async def talk(client: Client) -> int:
        assert (await said(client, "a", "hello"))[0] == 409
        chat = await opened(client, "a", "12")
        assert (chat["state"], chat["model"], chat["checkpoint"]) == ("ready", "fake", "12")
        assert await said(client, "a", "hello <b>you</b>") == (200, "model=fake hello <b>you</b> ")
        assert await said(client, "a", "again", temperature=0.5, evil=1) == (200, "model=fake temperature=0.5 again ")
        status, why = await said(client, "a", "refuse")
        assert (status, why) == (422, "the model's server refused: no such thing")
        for wrong in ({"temperature": "hot"}, {"temperature": -1}, {"max_tokens": 10**9}, {"messages": []}):
            assert (await said(client, "a", "x", **wrong))[0] == 422
        assert chats.server is not None and chats.server.process is not None
        return chats.server.process.pid

    assert not is_alive(ask(home, talk, chats=chats))


@pytest.mark.slow
def test_one_model_is_loaded_at_a_time_and_one_that_cannot_be_says_why(home: Path):
    for name in ("a", "broken"):
        write_run(home / "runs" / name, 1)
    chats = Chats(fake)

    async def talk(client: Client) -> None:
        await opened(client, "a")
        assert chats.server is not None and chats.server.process is not None
        first = chats.server.process
        await opened(client, "a")
        assert chats.server.process is first
        chat = await opened(client, "broken")
        assert chat["state"] == "ended" and "broken: config.json is no JSON" in chat["said"]
        assert first.returncode is not None
        async with client.get("/api/chat", params={"run": "a"}) as response:
            assert (await response.json())["state"] == "closed"
        refused = await client.post("/api/chat/open", json={"run": "a", "checkpoint": "--host"}, headers=CHANGE)
        assert refused.status == 422

    ask(home, talk, chats=chats)


def test_a_model_that_nobody_talks_to_is_ended(home: Path):
    write_run(home / "runs" / "a", 1)
    chats = Chats(fake, idle_s=0.3)

    async def talk(client: Client) -> None:
        await opened(client, "a")
        assert chats.server is not None
        await until(has_ended(chats))
        assert "nobody asked it anything" in chats.server.said[-1]
        assert (await said(client, "a", "hello"))[0] == 409

    ask(home, talk, chats=chats)


def test_a_model_that_dies_in_mid_sentence_is_told_of(home: Path):
    write_run(home / "runs" / "a", 1)
    chats = Chats(fake)

    async def talk(client: Client) -> None:
        await opened(client, "a")
        body = {"run": "a", "messages": [{"role": "user", "content": "die"}]}
        async with client.post("/api/chat/completions", json=body, headers=CHANGE) as response:
            data = await response.text()
            assert "model=fake" in data and "the answer was cut off" in data and "[DONE]" not in data
        await until(has_ended(chats))

    ask(home, talk, chats=chats)


def test_the_command_serves_a_directory_on_a_port_that_is_free(tmp_path: Path):
    command = serve_command(tmp_path, "best")
    assert command[1:] == ["-m", "rlflow", "serve", str(tmp_path), "--checkpoint", "best", *command[-4:]]
    assert command[-4:] == ["--engine", "torch", "--port", "0"] and "--checkpoint" not in serve_command(tmp_path, None)
