from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from rlflow.cli import report as command
from rlflow.tracking import charts
from rlflow.tracking.history import HistoryError, Series, bucket, read_stages, smooth
from rlflow.tracking.report import LONGEST_TEXT, _time_panel, shorten, write_curve_svg, write_report
from rlflow.tracking.rollouts import write_rollouts
from rlflow.types import Group, Prompt
from tests.flat_rollouts import flat


def make_stage(directory: Path, num_steps: int = 60, *, started: float = 1000.0) -> None:
    directory.mkdir(parents=True)
    with (directory / "metrics.jsonl").open("w") as file:
        for step in range(num_steps + 1):
            metrics = {"time/step_s": 10.0, "time/train_s": 6.0, "time/rollout_s": 3.0, "time/generate_s": 2.5}
            if step:
                metrics |= {"reward/mean": step / 100, "reward/exact/mean": step / 100, "staleness/max": 0.0}
                metrics |= {"trainer/grad_norm": None if step == 3 else 1.0, "custom/thing": step * 2.0}
            if step % 20 == 0:
                metrics |= {"eval/heldout/pass@1": 0.25 + step / 100, "eval/heldout/unscored_fraction": 0.0}
            file.write(json.dumps({"step": step, "time": started + step, **metrics}) + "\n")
    recipe = "algorithm: {name: grpo}\nmodel: {path: some/model}\nrewards: [{args: {api_key: hunter2-secret}}]\n"
    (directory / "recipe.yaml").write_text(recipe)


def add_rollouts(directory: Path) -> None:
    groups = []
    for index in range(8):
        prompt = Prompt(f"set:{index}", np.arange(2), [{"role": "user", "content": f"<b>Question {index}</b>"}], {})
        rollouts = tuple(
            flat([0, 1], [0, 1], r, text=f"<script>answer {index}.{g}</script>", rewards={"exact": r})
            for g, r in enumerate((float(index), -float(index), math.nan))
        )
        groups.append(Group(prompt, 0, rollouts))
    (directory / "rollouts").mkdir()
    for step in (1, 60):
        path = directory / "rollouts" / f"step_{step:06d}.parquet"
        write_rollouts(path, groups, [np.zeros(3)] * 8, ["trained"] * 24)


class Page(HTMLParser):
    """Collects tags and checks that they are balanced."""

    VOID = frozenset({"meta", "rect", "line", "circle", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag


def test_seconds_a_step_are_of_steps_alone_and_not_of_what_came_before_them(tmp_path: Path) -> None:
    make_stage(tmp_path / "run", num_steps=2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    start = json.dumps(json.loads(lines[0]) | {"time/startup_actors_s": 7.0, "time/step_s": 1000.0})
    metrics.write_text("\n".join([start, *lines[1:]]) + "\n")
    (stage,) = read_stages(tmp_path / "run")
    panel = _time_panel(stage)
    assert panel is not None
    # 6 s of training and 3 s of rollouts in steps of 10 s
    assert {entry.name: entry.value for entry in panel.legend} == {"train": "60%", "rollout": "30%", "other": "10%"}


def test_the_page_needs_nothing_but_itself_and_runs_no_script(tmp_path: Path) -> None:
    make_stage(tmp_path / "run")
    add_rollouts(tmp_path / "run")
    path = write_report(tmp_path / "run")
    text = path.read_text()
    page = Page(text)
    assert path == tmp_path / "run" / "report.html"
    assert page.sources == [] and "script" not in page.tags and "link" not in page.tags
    assert set(re.findall(r"https?://[^\"' <]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "&lt;script&gt;answer 7.0&lt;/script&gt;" in text and "&lt;b&gt;Question 7&lt;/b&gt;" in text
    assert "hunter2" not in text
    assert not list((tmp_path / "run").glob(".*"))


def test_the_page_shows_first_and_last_evaluation_best_and_worst_rollouts(tmp_path: Path) -> None:
    make_stage(tmp_path / "run")
    add_rollouts(tmp_path / "run")
    text = write_report(tmp_path / "run").read_text()
    assert "+0.600 since step 0" in text
    shown = re.findall(r'"reward">reward ([-\d.]+)<', text)
    assert shown == ["7", "6", "5", "-7", "-6", "-5"]
    assert "step_000060.parquet" in text
    assert "0 at every step: eval/heldout/unscored_fraction, staleness/max" in text
    assert "null at every step" not in text
    assert "More metrics (1)" in text and "custom/thing" in text
    # 60 steps of 10 s: 6 train, 3 rollout and 1 that no phase claims; what workers measured is not counted twice.
    assert re.findall(r"(train|rollout|other|generate)<b>(\d+%)", text) == [
        ("train", "60%"),
        ("rollout", "30%"),
        ("other", "10%"),
    ]


def test_a_metric_that_repeats_another_is_drawn_once(tmp_path: Path) -> None:
    make_stage(tmp_path / "run")
    text = write_report(tmp_path / "run").read_text()
    assert "reward/mean<b>" in text and "reward/exact/mean<b>" not in text


def test_stages_are_sections_in_the_order_they_ran(tmp_path: Path) -> None:
    make_stage(tmp_path / "run" / "a_second", started=2000.0)
    make_stage(tmp_path / "run" / "b_first", started=1000.0)
    text = write_report(tmp_path / "run").read_text()
    assert re.findall(r"<h2>(\w+)</h2>", text) == ["b_first", "a_second"]
    Page(text)


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "time": 5.0, "loss/total": null, "reward/mean": 0.5}\n{"step": 2,')
    Page(write_report(run).read_text())


def test_a_directory_without_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(HistoryError, match=r"no metrics\.jsonl with a step in it"):
        write_report(tmp_path)
    assert command.execute(command.make_parser().parse_args([str(tmp_path)])) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_the_command_writes_the_page_or_a_picture_and_prints_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_stage(tmp_path / "run")
    parser = command.make_parser()
    assert command.execute(parser.parse_args([str(tmp_path / "run")])) == 0
    picture = tmp_path / "curve.svg"
    assert command.execute(parser.parse_args([str(tmp_path / "run"), "--curve", str(picture)])) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "run" / "report.html"), str(picture)]


def test_the_picture_is_well_formed_and_has_a_line_a_metric(tmp_path: Path) -> None:
    make_stage(tmp_path / "run")
    path = tmp_path / "curve.svg"
    write_curve_svg(tmp_path / "run", ["reward/mean", "eval/heldout/pass@1"], path)
    root = ElementTree.parse(path).getroot()
    paths = [element for element in root.iter() if element.tag.endswith("}path")]
    assert [element.attrib["stroke"] for element in paths] == ["var(--s0)", "var(--s1)"]
    with pytest.raises(HistoryError, match=r"no step has 'reward/meen'; there are custom/thing"):
        write_curve_svg(tmp_path / "run", ["reward/meen"], path)


def test_names_in_a_pictures_legend_do_not_lie_on_each_other() -> None:
    """38 pixels beside a name, and 8 for each of its letters."""
    lines = [Series(name, ((0, 0.0), (1, 1.0))) for name in ("reward/mean", "kl", "loss")]
    root = ElementTree.fromstring(charts.standalone(lines))
    dots = [float(element.attrib["cx"]) for element in root.iter() if element.attrib.get("cy") == "22"]
    assert dots == [54.0, 54.0 + 38 + 8 * 11, 54.0 + 2 * 38 + 8 * 13]


def test_a_series_leaves_out_what_is_not_finite(tmp_path: Path) -> None:
    make_stage(tmp_path / "run", 5)
    (stage,) = read_stages(tmp_path / "run")
    assert [step for step, _ in stage.series("trainer/grad_norm").points] == [1, 2, 4, 5]
    assert stage.last("reward/mean") == 0.05
    assert math.isnan(stage.last("nothing"))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-3.0, 47.0, [0, 10, 20, 30, 40]), (0.0, 1e-6, None)],
)
def test_ticks_are_round_numbers_within_the_range(low: float, high: float, expected: list[float] | None) -> None:
    found = charts.ticks(low, high, 5)
    if expected is not None:
        assert found == pytest.approx(expected)
    assert low <= found[0] and found[-1] <= high * (1 + 1e-9) and 3 <= len(found) <= 7


def test_tick_labels_have_the_decimals_their_distance_needs() -> None:
    assert charts.tick_labels([0.0, 0.5, 1.0]) == ["0.0", "0.5", "1.0"]
    assert charts.tick_labels([0.0, 10.0, 20.0]) == ["0", "10", "20"]
    assert charts.tick_labels([0.02, 0.03]) == ["0.02", "0.03"]
    assert charts.tick_labels([0.0, 1e4, 2e4]) == ["0", "10k", "20k"]
    assert charts.tick_labels([0.0, 5e-7]) == ["0", "5.0e-7"]


def test_a_constant_and_an_empty_series_can_be_drawn() -> None:
    for points in ((), ((1.0, 0.0),), ((1.0, 5.0), (2.0, 5.0))):
        ElementTree.fromstring(charts.line_chart([Series("x", points)]))


def test_bars_are_means_of_neighbouring_steps() -> None:
    rows = [(float(step), {"train": 2.0, "sync": step % 2 * 2.0}) for step in range(1, 241)]
    root = ElementTree.fromstring(charts.stacked_bars(rows, ["train", "sync"]))
    titles = [element.text or "" for element in root.iter() if element.tag.endswith("}title")]
    assert len(titles) == charts.MOST_BARS
    assert titles[0].splitlines() == ["steps 1 to 4, mean: 3 s", "train 2 s", "sync 1 s"]


def test_bucketing_keeps_the_ends_and_the_mean_of_a_line() -> None:
    points = [(float(x), 3.0 * x) for x in range(1000)]
    few = bucket(points, 50)
    assert len(few) == 50 and few[0] == points[0] and few[-1] == points[-1]
    assert all(y == pytest.approx(3.0 * x) for x, y in few)
    # Equal numbers of neighbours, some 21 each, and none of the 998 is left out.
    assert few[1][0] == pytest.approx(11.0) and few[-2][0] == pytest.approx(988.0)
    assert bucket(points[:50], 50) == points[:50]


def test_smoothing_keeps_a_line_and_flattens_noise() -> None:
    line = [(float(x), 2.0 * x) for x in range(100)]
    assert all(y == pytest.approx(2.0 * x) for x, y in smooth(line, 6)[10:90])
    noise = [(float(x), float((-1) ** x)) for x in range(100)]
    assert max(abs(y) for _, y in smooth(noise, 10)) < 0.2


def test_the_middle_of_a_long_text_is_left_out() -> None:
    assert shorten("short") == "short"
    text = shorten("a" * LONGEST_TEXT + "b" * LONGEST_TEXT)
    assert text.startswith("aaa") and text.endswith("bbb") and f"[... {LONGEST_TEXT} characters left out ...]" in text


def test_null_is_shown_as_null_and_not_as_0_or_as_an_earlier_value(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    rows = [
        {"step": 0, "time": 1.0, "eval/heldout/pass@1": 0.5},
        {"step": 1, "time": 2.0, "reward/mean": 0.25, "reward/judge/mean": None, "staleness/max": 0.0},
        {"step": 2, "time": 3.0, "reward/mean": None, "reward/judge/mean": None, "eval/heldout/pass@1": None},
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report(tmp_path / "run").read_text()
    assert "<small>reward/mean</small><b>null</b><small>0.250 at step 1</small>" in text
    assert "reward/mean<b>null</b>" in text
    assert "null at every step: reward/judge/mean" in text
    assert "0 at every step: staleness/max" in text
    row = re.search(r"<tr><td>heldout/pass@1</td>.*?</tr>", text, re.DOTALL)
    assert row is not None and row[0].count("null") == 1 and "0.500" in row[0]
