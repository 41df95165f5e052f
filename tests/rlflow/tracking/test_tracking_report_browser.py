"""The report's page as a person has it: in headless Chromium."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from rlflow.tracking.report import write_report
from rlflow.tracking.rollouts import write_rollouts
from rlflow.types import Group, Prompt
from tests.browser import Tab, browser, find_chromium
from tests.flat_rollouts import flat

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed (Debian: apt install chromium)"),
]

HOSTILE = (
    "</script><script>document.title = 'taken'</script>",
    "<img src=x onerror=\"document.title = 'taken'\">",
    '"><svg onload=document.title="taken">',
    "javascript:document.title='taken' ${document.title='taken'} {{7*7}} \u2028 \ud83d",
)
"""What a policy could write that wanted a page to do something."""


def make_run(directory: Path, learning_rate: float = 0.1) -> Path:
    """Thirty steps; rollouts of steps 1 and 30, four prompts with four rollouts each."""
    directory.mkdir(parents=True)
    with (directory / "metrics.jsonl").open("w") as file:
        for step in range(1, 31):
            metrics = {"reward/mean": step / 100 + learning_rate, "entropy": 1.0 / step, "custom/<b>name</b>": step % 7}
            metrics |= {"time/step_s": 2.0, "time/train_s": 1.5, "reward/error_fraction": 0.25}
            file.write(json.dumps({"step": step, "time": 1000.0 + step, **metrics}) + "\n")
    recipe = {"algorithm": {"name": "grpo"}, "model": {"path": HOSTILE[0]}, "trainer": {"learning_rate": learning_rate}}
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    groups = []
    for number in range(4):
        prompt = Prompt(
            f"set:{number}", np.arange(2), [{"role": "user", "content": HOSTILE[number]}], {"solution": HOSTILE[1]}
        )
        rollouts = tuple(
            flat(
                [0, 1],
                [2, 3, 4],
                reward,
                text=f"{HOSTILE[index]} of prompt {number}",
                rewards={"exact": reward},
                logprobs=[-0.01, -2.5, -9.0],
                finish_reason="length" if index == 3 else "stop",
                error=f"exact: it raised {HOSTILE[0]}" if math.isnan(reward) else "",
            )
            for index, reward in enumerate((0.0, 1.0, float(number), math.nan))
        )
        groups.append(Group(prompt, 0, rollouts))
    (directory / "rollouts").mkdir()
    for step in (1, 30):
        path = directory / "rollouts" / f"step_{step:06d}.parquet"
        write_rollouts(path, groups, [np.array([-1.0, 1.0, 0.5, 0.0])] * 4, ["trained"] * 16)
    return directory


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser() as tab:
        yield tab


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"file://{write_report(make_run(tmp_path_factory.mktemp('runs') / 'one'))}"


@pytest.fixture
def shown(tab: Tab, page: str) -> Tab:
    """The page of one run, with the episodes of its newest step."""
    tab.errors.clear()
    tab.requests.clear()
    tab.look(1280, 900)
    tab.open(page)
    tab.wait("document.querySelectorAll('.episodes tbody tr').length")
    return tab


def texts(tab: Tab, selector: str) -> list[str]:
    return tab.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map((one) => one.textContent)")


def choose(tab: Tab, label: str, value: str) -> None:
    """Puts a value into the control of that label, as a person does."""
    control = f"document.querySelector('[aria-label=\"{label}\"]')"
    tab.evaluate(f"{control}.value = {json.dumps(value)}; {control}.dispatchEvent(new Event('input'))")


def rewards_shown(tab: Tab) -> list[str]:
    return texts(tab, ".episodes tbody tr td:first-child")


def test_what_the_policy_wrote_is_shown_as_text_and_runs_nothing(shown: Tab) -> None:
    assert shown.evaluate("document.title") == "one"
    for row, text in enumerate(HOSTILE[:3]):
        shown.evaluate(f"document.querySelectorAll('.episodes tbody tr')[{row}].click()")
        choose(shown, "colour", "nothing")
        assert texts(shown, ".completion") == [f"{text} of prompt 0"]
        assert texts(shown, "pre.answer") == [HOSTILE[1]]
    assert shown.evaluate("document.title") == "one"
    assert shown.evaluate("document.querySelectorAll('main script, main img, main b > b, h4 > b').length") == 0
    assert HOSTILE[0] in texts(shown, ".stage > .facts")[0]
    assert shown.errors == []
    assert [request for request in shown.requests if not request.startswith("file:")] == []


def test_a_script_that_gets_into_the_page_is_refused_by_its_policy(shown: Tab) -> None:
    shown.evaluate("document.querySelector('main').innerHTML = '<img src=x onerror=\"document.title = 1\">'")
    shown.wait("true")
    shown.evaluate("new Promise((done) => setTimeout(done, 100))")
    assert shown.evaluate("document.title") == "one"
    assert any("Content Security Policy" in error for error in shown.errors)


def test_the_pointer_shows_a_steps_values_in_every_chart(shown: Tab) -> None:
    place = shown.evaluate(
        "(() => { const box = document.querySelector('.plot').getBoundingClientRect();"
        "return [box.left + 46 + (box.width - 56) * 9 / 29, box.top + 50]; })()"
    )
    shown.pointer(*place)
    shown.wait("!document.querySelector('.tooltip').hidden")
    assert texts(shown, ".tooltip strong") == ["step 10"]
    assert texts(shown, ".tooltip div") == ["reward/mean0.200"]
    legends = dict(zip(texts(shown, ".chart h4"), texts(shown, ".chart .legend"), strict=True))
    assert legends["Entropy, nats a token"] == "entropy0.100"
    assert legends["Seconds a step"] == "train1.500other0.500"
    shown.pointer(2, 2)
    shown.wait("document.querySelector('.tooltip').hidden")
    legends = dict(zip(texts(shown, ".chart h4"), texts(shown, ".chart .legend"), strict=True))
    assert legends["Seconds a step"] == "train75%other25%" and legends["Reward"] == "reward/mean0.400"


def test_arrow_keys_move_the_cursor_of_a_chart(shown: Tab) -> None:
    shown.evaluate("document.querySelector('.plot').focus()")
    for key in ("ArrowRight", "ArrowLeft", "ArrowLeft"):
        shown.call("Input.dispatchKeyEvent", type="keyDown", key=key)
    assert texts(shown, ".tooltip strong") == ["step 28"]


def test_the_slider_smooths_noisy_curves_and_leaves_none_faint_at_0(shown: Tab) -> None:
    shown.evaluate("document.querySelector('details').open = true")
    shown.wait("document.querySelectorAll('details .line').length")
    assert shown.evaluate("document.querySelectorAll('.line.smooth').length") == 1

    def smooth(percent: int) -> str:
        slider = "document.getElementById('smoothing')"
        shown.evaluate(f"{slider}.value = {percent}; {slider}.dispatchEvent(new Event('input'))")
        return shown.evaluate("document.querySelector('.line.smooth')?.getAttribute('d') ?? ''")

    assert smooth(60) != smooth(20) != ""
    assert smooth(0) == "" and shown.evaluate("document.querySelectorAll('.line.faint').length") == 0


def test_rollouts_are_filtered_and_sorted(shown: Tab) -> None:
    assert rewards_shown(shown)[:8] == ["0", "1", "0", "-", "0", "1", "1", "-"]
    choose(shown, "order", "reward, highest first")
    assert rewards_shown(shown)[:4] == ["3", "2", "1", "1"]
    choose(shown, "number", "reward/exact")
    choose(shown, "comparison", "<")
    choose(shown, "bound", "1")
    assert rewards_shown(shown) == ["0"] * 5
    choose(shown, "bound", "")
    choose(shown, "how it ended", "a reward failed")
    assert rewards_shown(shown) == ["-"] * 4
    assert texts(shown, ".error") == [f"exact: it raised {HOSTILE[0]}"]
    choose(shown, "how it ended", "any end")
    choose(shown, "text", "ONERROR")
    assert texts(shown, ".controls .quiet") == ["7 of 16"]
    choose(shown, "text", "nowhere")
    assert texts(shown, ".episode") == ["No rollout of this step is so."]


def test_a_rollout_shows_numbers_answer_group_and_the_logprob_of_each_token(shown: Tab) -> None:
    shown.evaluate("document.querySelectorAll('.episodes tbody tr')[2].click()")
    assert texts(shown, ".numbers span") == ["reward0", "advantage0.500", "exact0"]
    assert texts(shown, ".siblings button") == ["0", "1", "0", "-"]
    assert texts(shown, ".completion span") == ["[2]", "[3]", "[4]"]
    colors = shown.evaluate("[...document.querySelectorAll('.completion span')].map((one) => one.style.background)")
    assert colors[0] == "" and "38%" in colors[1] and "75%" in colors[2]
    place = shown.evaluate(
        "(() => { const one = document.querySelectorAll('.completion span')[1]; one.scrollIntoView();"
        "const box = one.getBoundingClientRect(); return [box.left + box.width / 2, box.top + box.height / 2]; })()"
    )
    shown.pointer(*place)
    shown.wait("!document.querySelector('.tooltip').hidden")
    # exp(-2.5) is 0.0821
    assert texts(shown, ".tooltip div") == ["logprob-2.500", "probability8.208%", "policy version0"]


def test_steps_are_walked_through(shown: Tab) -> None:
    assert texts(shown, ".step") == ["step 30"]
    shown.evaluate("document.querySelector('[aria-label=\"step before\"]').click()")
    shown.wait("document.querySelector('.step').textContent === 'step 1'")
    assert len(rewards_shown(shown)) == 16


def test_runs_are_drawn_over_each_other(tab: Tab, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", 0.2)]
    path = write_report(runs[0], compare=runs[1:], output=tmp_path / "both.html")
    tab.open(f"file://{path}")
    assert texts(tab, ".chart .legend")[0] == "one0.400two0.500"
    assert tab.evaluate("document.querySelector('.chart svg').querySelectorAll('path').length") == 2
    (table,) = tab.evaluate(
        "[...document.querySelectorAll('h3')].filter((h) => h.textContent.startsWith('What differs'))"
        ".map((h) => [...h.nextSibling.querySelectorAll('td')].map((cell) => cell.textContent))"
    )
    assert table == ["trainer.learning_rate", "0.1", "0.2"]


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window_in_the_dark_or_in_the_light(tab: Tab, page: str, width: int) -> None:
    inks = {}
    for dark in (False, True):
        tab.look(width, 800, dark=dark)
        tab.open(page)
        tab.wait("document.querySelectorAll('.episodes tbody tr').length")
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        inks[dark] = tab.evaluate("getComputedStyle(document.body).color")
    assert inks == {False: "rgb(29, 35, 48)", True: "rgb(230, 233, 239)"}
