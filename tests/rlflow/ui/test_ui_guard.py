"""Who is answered: no page of another site, nobody without the token, and nothing outside the directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ui_server import CHANGE, Client, ask, write_run

from rlflow.ui.guard import is_loopback, make_token

TOKEN = "a-token-of-tests-1"


def statuses(home: Path, *requests: tuple[str, str, dict[str, Any]], **settings: Any) -> list[int]:
    async def talk(client: Client) -> list[int]:
        answers = []
        for method, path, options in requests:
            async with client.request(method, path, allow_redirects=False, **options) as response:
                answers.append(response.status)
        return answers

    return ask(home, talk, **settings)


def of_host(name: str) -> tuple[str, str, dict[str, Any]]:
    return ("GET", "/api/runs", {"headers": {"Host": name}})


def test_a_name_that_somebody_pointed_at_this_address_is_refused(home: Path):
    evil = [of_host(name) for name in ("evil.example", "evil.example:8770", "localhost.evil.example", "")]
    good = [of_host(name) for name in ("localhost:8770", "127.0.0.1", "[::1]:80", "ui.localhost", "box.example:443")]
    assert statuses(home, *evil, names=("box.example",)) == [403] * 4
    assert statuses(home, *good, names=("box.example",)) == [200] * 5
    assert statuses(home, of_host("[::1"), of_host("[evil]")) == [400] * 2


def test_calls_that_change_something_need_what_a_page_of_another_site_cannot_send(home: Path):
    def post(**headers: str) -> tuple[str, str, dict[str, Any]]:
        sent = {**CHANGE, "Content-Type": "application/json", "Host": "localhost:1", **headers}
        return ("POST", "/api/stop", {"data": "{}", "headers": {key: value for key, value in sent.items() if value}})

    refused = [
        post(Origin="http://evil.example"),
        post(Origin="null"),
        post(Origin="http://[::1"),
        post(Origin="http://localhost:2"),
        post(**{"Sec-Fetch-Site": "cross-site"}),
        post(**{"Sec-Fetch-Site": "same-site"}),
        post(**{"X-Rlflow": ""}),
    ]
    assert statuses(home, *refused) == [403] * len(refused)
    assert statuses(home, post(**{"Content-Type": "text/plain"})) == [415]
    assert statuses(home, ("PUT", "/api/stop", {}), ("DELETE", "/api/runs", {}), ("GET", "/api/stop", {})) == [405] * 3
    own = {"Origin": "http://localhost:1", "Sec-Fetch-Site": "same-origin"}
    assert statuses(home, post(**own), post()) == [422, 422], "the call itself names no run"


def test_without_the_token_nothing_is_told_and_with_it_everything(home: Path):
    write_run(home / "runs" / "secret-run", 1)

    async def talk(client: Client) -> None:
        for path in ("/api/runs", "/api/run?run=secret-run", "/api/recipes", "/api/chat", "/static/../x"):
            response = await client.get(path)
            assert response.status in (401, 404) and "secret-run" not in await response.text()
        wrong = {"Authorization": f"Bearer {TOKEN}x"}
        assert (await client.get("/api/runs", headers=wrong)).status == 401
        assert (await client.post("/api/start", json={}, headers=CHANGE)).status == 401
        assert (await client.get("/api/runs", headers={"Authorization": f"Bearer {TOKEN}"})).status == 200
        page = await client.get("/", allow_redirects=False)
        assert (page.status, page.headers["Location"]) == (303, "/login")
        assert (await client.get("/login")).status == 200 == (await client.get("/static/login.js")).status
        assert (await client.post("/login", json={"token": "guess"}, headers=CHANGE)).status == 401
        assert (await client.post("/login", json=["guess"], headers=CHANGE)).status == 401
        broken = CHANGE | {"Content-Type": "application/json"}
        assert (await client.post("/login", data="{", headers=broken)).status == 400
        assert (await client.get("/api/runs")).status == 401
        entered = await client.post("/login", json={"token": TOKEN}, headers=CHANGE)
        cookie = entered.headers["Set-Cookie"]
        assert entered.status == 200 and "HttpOnly" in cookie and "SameSite=Strict" in cookie
        assert (await client.get("/api/runs")).status == 200 == (await client.get("/")).status

    ask(home, talk, host="0.0.0.0", token=TOKEN)


def test_a_link_with_the_token_leaves_it_out_of_the_address_bar(home: Path):
    async def talk(client: Client) -> None:
        for _ in range(2):
            opened = await client.get(f"/?token={TOKEN}", allow_redirects=False)
            assert (opened.status, opened.headers["Location"]) == (303, "/")
            assert (await client.get("/api/runs")).status == 200

    ask(home, talk, host="0.0.0.0", token=TOKEN)


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "a/../../outside",
        "/etc",
        "out",
        "out/a",
        "",
        "..",
        "a\0b",
        "missing",
        "%2e%2e/outside",
        "a" * 5000,
    ],
)
def test_no_name_leads_out_of_the_directory(home: Path, name: str):
    write_run(home / "runs" / "a", 1)
    write_run(home / "outside" / "a", 1)
    write_run(home / "outside", 1)
    (home / "runs" / "out").symlink_to(home / "outside")
    paths = ("/api/run", "/api/metrics", "/api/episodes", "/api/log", "/api/chat")
    asked = [("GET", path, {"params": {"run": name, "name": "run.log"}}) for path in paths[:4]]
    assert set(statuses(home, *asked)) == {404}
    for path in ("/api/stop", "/api/resume", "/api/chat/open"):
        assert statuses(home, ("POST", path, {"json": {"run": name}, "headers": CHANGE})) == [404]


def test_links_and_dots_in_a_run_do_not_lead_out_of_it(home: Path):
    run = write_run(home / "runs" / "a", 1)
    (run / "logs").mkdir()
    (run / "logs" / "passwd.log").symlink_to("/etc/passwd")
    (home / "runs" / "secret.log").write_text("secret")
    (run / "metrics.jsonl").unlink()
    (run / "outcome.json").write_text("{}")
    (run / "metrics.jsonl").symlink_to("/etc/passwd")
    (run / "rollouts").symlink_to("/etc")
    names = ("passwd.log", "../../secret.log", "../../../../../etc/passwd", "/etc/passwd", "")
    logs = [("GET", "/api/log", {"params": {"run": "a", "name": name}}) for name in names]
    others = [("GET", "/api/metrics", {"params": {"run": "a"}}), ("GET", "/api/episodes", {"params": {"run": "a"}})]
    commands = [("GET", "/api/log", {"params": {"command": name}}) for name in ("../x", "/etc/passwd", "x")]
    assert set(statuses(home, *logs, *others, *commands)) == {404}
    files = [("GET", f"/static/{path}", {}) for path in ("../server.py", "%2e%2e/server.py", "/etc/passwd")]
    assert set(statuses(home, *files)) <= {403, 404}


def test_bodies_are_bounded_and_must_be_objects(home: Path):
    def post(data: str) -> tuple[str, str, dict[str, Any]]:
        return ("POST", "/api/check", {"data": data, "headers": {**CHANGE, "Content-Type": "application/json"}})

    deep = "[" * 100_000
    assert statuses(home, post("x" * (3 << 20)), post("no"), post(deep), post("[]"), post("{}")) == [
        413,
        400,
        400,
        400,
        422,
    ]


def test_every_answer_forbids_frames_and_foreign_scripts(home: Path):
    async def talk(client: Client) -> None:
        for path in ("/", "/api/runs", "/static/app.js", "/nothing"):
            response = await client.get(path)
            assert "script-src 'self';" in response.headers["Content-Security-Policy"], path
            assert (
                response.headers["X-Frame-Options"] == "DENY"
                and response.headers["X-Content-Type-Options"] == "nosniff"
            )

    ask(home, talk)


def test_only_addresses_of_this_machine_alone_need_no_token():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))
    assert len(make_token()) >= 32 and make_token() != make_token()
