"""The page in a browser: a run is started from the form, watched, stopped; what a policy wrote stays text."""

from __future__ import annotations

import json
import sys
import threading
from asyncio import new_event_loop, run_coroutine_threadsafe
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from test_ui_chat import FAKE_SERVE
from test_ui_commands import RECIPE
from ui_server import FAKE_RLFLOW, write_run

from rlflow.driver.outcome import write_outcome
from rlflow.tracking.rollouts import write_rollouts
from rlflow.types import Group, Prompt
from rlflow.ui.chat import Chats
from rlflow.ui.server import Settings, make_app
from tests.browser import Tab, browser, find_chromium
from tests.flat_rollouts import flat

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed (Debian: apt install chromium)"),
]
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


@contextmanager
def served(home: Path) -> Iterator[str]:
    """A server of home's runs/ on a port of its own, in a thread; its address."""
    loop, started = new_event_loop(), threading.Event()
    threading.Thread(target=lambda: (loop.call_soon(started.set), loop.run_forever()), daemon=True).start()
    assert started.wait(10)

    def model(directory: Path, checkpoint: str | None) -> list[str]:
        return [sys.executable, str(FAKE_SERVE), str(directory)]

    async def start() -> web.AppRunner:
        program = (sys.executable, str(FAKE_RLFLOW))
        runner = web.AppRunner(make_app(Settings(home / "runs", here=home, program=program), Chats(model)))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    runner = run_coroutine_threadsafe(start(), loop).result(20)
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        run_coroutine_threadsafe(runner.cleanup(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)


def text_of(tab: Tab, selector: str) -> str:
    return tab.evaluate(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''")


def wait(tab: Tab, expression: str) -> None:
    """Waits until an expression is something, an element say."""
    tab.wait(f"Boolean({expression})")


def put(tab: Tab, selector: str, value: str) -> None:
    """Types into a field, as far as the page can tell."""
    field = f"document.querySelector({json.dumps(selector)})"
    tab.evaluate(f"{field}.value = {json.dumps(value)}; {field}.dispatchEvent(new Event('input'))")


def press(tab: Tab, text: str) -> None:
    tab.evaluate(
        f"[...document.querySelectorAll('button')].find((one) => one.textContent === {json.dumps(text)}).click()"
    )


def write_hostile_run(directory: Path) -> None:
    """Thirty steps, and rollouts of two of them; whatever holds a text holds one that would like to be a script."""
    run = write_run(directory, 30)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{**row, f"reward/{HOSTILE}/mean": 0.5} for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_outcome(run, "failed", HOSTILE)
    (run / "recipe.yaml").write_text(json.dumps({"algorithm": {"name": HOSTILE}, "model": {"path": HOSTILE}}))
    for name in ("logs", "rollouts"):
        (run / name).mkdir()
    (run / "logs" / "run.log").write_text(HOSTILE)
    prompt = Prompt("p", np.arange(2), [{"role": "user", "content": HOSTILE}], {"solution": HOSTILE})
    group = Group(prompt, 0, (flat([0, 1], [2, 3], 1.0, text=HOSTILE), flat([0, 1], [2], 0.0, text="no")))
    for step in (1, 30):
        path = run / "rollouts" / f"step_{step:06d}.parquet"
        write_rollouts(path, [group], [np.array([1.0, -1.0])], ["trained"] * 2)


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser() as tab:
        yield tab


def test_what_runs_left_is_shown_as_text_in_every_view(home: Path, tab: Tab):
    write_hostile_run(home / "runs" / "bad")
    write_outcome(write_run(home / "runs" / "good" / "sft", 5), "finished")
    tab.errors.clear()
    with served(home) as address:
        tab.look(1200, 900)
        tab.call("Page.navigate", url=address)
        wait(tab, "document.querySelectorAll('.runs tbody tr').length === 2")
        assert text_of(tab, ".runs .failed .why") == HOSTILE and text_of(tab, ".runs .failed .algorithm") == HOSTILE
        tab.evaluate("document.querySelector('.runs .failed a').click()")
        wait(tab, "document.querySelectorAll('.chart svg').length > 1")
        assert f"reward/{HOSTILE}" in tab.evaluate("document.querySelector('.charts').innerText")
        for view, selector in (("logs", "pre.log"), ("recipe", "pre.recipe"), ("episodes", "pre.answer")):
            tab.evaluate(f"location.hash = '#/run/bad?{view}'")
            wait(tab, f"document.querySelector('{selector}')?.textContent.includes('script')")
        choose = "document.querySelectorAll('.episodes tbody tr')"
        assert tab.evaluate(f"{choose}.length") == 2 and text_of(tab, "pre.answer") == HOSTILE
        assert tab.evaluate("document.querySelectorAll('main img, main script').length") == 0
        assert "taken" not in tab.evaluate("document.title")
        tab.evaluate("document.querySelector('main').innerHTML = '<img src=x onerror=\"document.title = 1\">'")
        wait(tab, "document.querySelector('main img').complete")
        assert tab.evaluate("document.title") != "1", "the policy of the page lets no such script run"


def test_a_run_is_started_from_the_form_watched_stopped_and_talked_to(home: Path, tab: Tab):
    (home / "recipes" / "fake.yaml").write_text(RECIPE)
    tab.errors.clear()
    with served(home) as address:
        tab.look(1200, 900)
        tab.call("Page.navigate", url=f"{address}#/start")
        wait(tab, "document.querySelector('#text')?.value.includes('algorithm')")
        put(tab, "#text", RECIPE.replace("steps: 100000", "stepz: 100000"))
        press(tab, "Check")
        wait(tab, "document.querySelector('.problems li')")
        assert text_of(tab, ".problems li").startswith("line 5: ") and text_of(tab, ".gutter .wrong") == "5\n"
        put(tab, "#text", RECIPE)
        press(tab, "Start")
        wait(tab, "location.hash.startsWith('#/command/') && document.querySelector('.facts, .quiet a')")
        tab.evaluate("location.hash = '#/'")
        wait(tab, "document.querySelector('.runs .running a')")
        tab.evaluate("document.querySelector('.runs .running a').click()")
        wait(tab, "document.querySelector('.badge.running') && document.querySelector('.chart svg path')")
        before = int(text_of(tab, ".facts").partition("step ")[2].split()[0])
        wait(tab, f"+/step (\\d+)/.exec(document.querySelector('.facts').textContent)[1] > {before}")
        plots = "[...document.querySelectorAll('.plot')]"
        assert tab.evaluate(f"{plots}.length") > 1
        assert tab.evaluate(f"{plots}.every((plot) => plot.firstChild.clientWidth <= plot.clientWidth)")
        press(tab, "Stop")
        wait(tab, "document.querySelector('.badge.stopped')")
        assert "go on with --resume" in text_of(tab, ".head .notice")
        tab.evaluate("location.hash = '#/run/fake?chat'")
        wait(tab, "document.querySelector('#which option')")
        press(tab, "Load the model")
        wait(tab, "document.querySelector('.chat:not([hidden])')")
        put(tab, "#say", HOSTILE)
        press(tab, "Send")
        wait(tab, "document.querySelector('.bubble.assistant')?.textContent.includes('script')")
        assert text_of(tab, ".bubble.user") == HOSTILE
        assert "taken" not in tab.evaluate("document.title") and tab.errors == []
