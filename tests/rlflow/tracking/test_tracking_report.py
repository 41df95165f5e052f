from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from rlflow.cli import report as command
from rlflow.tracking import charts, embedding
from rlflow.tracking.embedding import MOST_CHARACTERS, embed_rollouts, shorten, spread, unpack
from rlflow.tracking.history import HistoryError, Series, bucket, read_stages, smooth
from rlflow.tracking.panels import phases_of
from rlflow.tracking.report import differences, distinct_names, match_stages, thin, write_curve_svg, write_report
from rlflow.tracking.rollouts import write_rollouts
from rlflow.types import Group, Prompt
from tests.flat_rollouts import flat
from tests.report_pages import embedded, view_of


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


def add_rollouts(directory: Path, steps: Iterable[int] = (1, 60)) -> None:
    groups = []
    for index in range(8):
        prompt = Prompt(f"set:{index}", np.arange(2), [{"role": "user", "content": f"<b>Question {index}</b>"}], {})
        rollouts = tuple(
            flat([0, 1], [0, 1], r, text=f"<script>answer {index}.{g}</script>", rewards={"exact": r})
            for g, r in enumerate((float(index), -float(index), math.nan))
        )
        groups.append(Group(prompt, 0, rollouts))
    (directory / "rollouts").mkdir()
    for step in steps:
        path = directory / "rollouts" / f"step_{step:06d}.parquet"
        write_rollouts(path, groups, [np.zeros(3)] * 8, ["trained"] * 24)


def test_seconds_a_step_are_of_steps_alone_and_not_of_what_came_before_them(tmp_path: Path) -> None:
    make_stage(tmp_path / "run", num_steps=2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    start = json.dumps(json.loads(lines[0]) | {"time/startup_actors_s": 7.0, "time/step_s": 1000.0})
    metrics.write_text("\n".join([start, *lines[1:]]) + "\n")
    (stage,) = read_stages(tmp_path / "run")
    # 6 s of training and 3 s of rollouts in steps of 10 s
    assert [(phase.name, phase.share) for phase in phases_of(stage)] == [
        ("train", 0.6),
        ("rollout", 0.3),
        ("other", 0.1),
    ]


def test_the_page_holds_data_alone_and_its_policy_lets_only_its_own_script_run(tmp_path: Path) -> None:
    make_stage(tmp_path / "run")
    add_rollouts(tmp_path / "run")
    path = write_report(tmp_path / "run")
    text = path.read_text()
    assert path == tmp_path / "run" / "report.html"
    assert set(re.findall(r"https?://[^\"' <]+", text)) == {"http://www.w3.org/2000/svg"}
    assert (
        "answer 7" not in text and "Question" not in text and "hunter2" not in text + json.dumps(embedded(text)["main"])
    )
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None and f"default-src 'none'; script-src 'sha256-{digest}'; style-src" in policy[1]
    assert not list((tmp_path / "run").glob(".*"))


def test_the_page_has_curves_evaluations_times_and_the_rollouts_of_every_step(tmp_path: Path) -> None:
    make_stage(tmp_path / "run")
    add_rollouts(tmp_path / "run")
    text = write_report(tmp_path / "run").read_text()
    view = view_of(text)
    assert view["metrics"]["steps"] == list(range(61))
    assert view["metrics"]["metrics"]["reward/mean"][:3] == [None, 0.01, 0.02]
    assert ["heldout/pass@1", "0.850", "+0.600 since step 0"] in view["tiles"]
    assert view["unchanging"] == [["0", ["eval/heldout/unscored_fraction", "staleness/max"]]]
    assert view["more_panels"] == [["custom/thing", ["custom/thing"]]]
    # 60 steps of 10 s: 6 train, 3 rollout and 1 that no phase claims; what workers measured is not counted twice.
    assert [(phase["name"], phase["share"]) for phase in view["phases"]] == [
        ("train", pytest.approx(0.6)),
        ("rollout", pytest.approx(0.3)),
        ("other", pytest.approx(0.1)),
    ]
    steps = [(one["step"], one["total"], one["kept"], one["has_tokens"]) for one in view["rollouts"]]
    assert steps == [(1, 24, 24, True), (60, 24, 24, True)] and view["notes"] == []
    page = embedded(text)[view["rollouts"][1]["chunk"]]
    assert page["episodes"][21]["completion"] == "<script>answer 7.0</script>"


def test_a_metric_that_repeats_another_is_drawn_once(tmp_path: Path) -> None:
    make_stage(tmp_path / "run")
    assert ["Reward", ["reward/mean"]] in view_of(write_report(tmp_path / "run").read_text())["panels"]


def test_stages_are_in_the_order_they_ran(tmp_path: Path) -> None:
    make_stage(tmp_path / "run" / "a_second", started=2000.0)
    make_stage(tmp_path / "run" / "b_first", started=1000.0)
    stages = embedded(write_report(tmp_path / "run").read_text())["main"]["stages"]
    assert [stage["name"] for stage in stages] == ["b_first", "a_second"]


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "time": 5.0, "loss/total": null, "reward/mean": 0.5}\n{"step": 2,')
    assert view_of(write_report(run).read_text())["metrics"]["metrics"] == {"loss/total": [None], "reward/mean": [0.5]}


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
    picture, elsewhere = tmp_path / "curve.svg", tmp_path / "page.html"
    assert command.execute(parser.parse_args([str(tmp_path / "run"), "--curve", str(picture)])) == 0
    assert command.execute(parser.parse_args([str(tmp_path / "run"), "-o", str(elsewhere)])) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "run" / "report.html"), str(picture), str(elsewhere)]
    assert elsewhere.read_text() == (tmp_path / "run" / "report.html").read_text()


def test_a_directory_that_cannot_be_written_is_one_line_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_stage(tmp_path / "run")

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    assert command.execute(command.make_parser().parse_args([str(tmp_path / "run")])) == 2
    assert capsys.readouterr().err == (
        f"{tmp_path}/run/report.html cannot be written (Permission denied): name another file with -o\n"
    )


def test_runs_are_compared_stage_by_stage_and_the_keys_that_differ_are_listed(tmp_path: Path) -> None:
    for name, rate in (("one", "1.0e-4"), ("two", "2.0e-4")):
        make_stage(tmp_path / name / "sft", 4)
        make_stage(tmp_path / name / "grpo", 5, started=2000.0)
        with (tmp_path / name / "grpo" / "recipe.yaml").open("a") as file:
            file.write(f"trainer: {{learning_rate: {rate}}}\nrun: {{output_dir: {tmp_path / name}}}\n")
    path = write_report(tmp_path / "one", compare=[tmp_path / "two"], output=tmp_path / "both.html")
    stages = embedded(path.read_text())["main"]["stages"]
    assert [(stage["name"], [run["run"] for run in stage["runs"]]) for stage in stages] == [
        ("sft", ["one", "two"]),
        ("grpo", ["one", "two"]),
    ]
    assert stages[0]["differences"] == []
    assert stages[1]["differences"] == [["trainer.learning_rate", ["0.0001", "0.0002"]]]


def test_the_only_stage_of_a_run_is_compared_with_the_last_of_another(tmp_path: Path) -> None:
    make_stage(tmp_path / "one" / "sft", 4)
    make_stage(tmp_path / "one" / "grpo", 4, started=2000.0)
    make_stage(tmp_path / "two" / "one", 4)
    runs = [read_stages(tmp_path / "one"), read_stages(tmp_path / "two" / "one")]
    assert [(name, [index for index, _ in group]) for name, group in match_stages(runs)] == [
        ("sft", [0]),
        ("grpo", [0, 1]),
    ]
    assert distinct_names([tmp_path / "one", tmp_path / "two" / "one"]) == [f"{tmp_path.name}/one", "two/one"]
    with pytest.raises(HistoryError, match="is named twice"):
        distinct_names([tmp_path / "one", tmp_path / "one"])


def test_keys_that_differ_are_found_in_lists_and_where_a_recipe_lacks_them() -> None:
    one = {"rewards": [{"name": "a", "weight": 1.0}], "run": {"output_dir": "x", "steps": 5}, "kl": None}
    two = {"rewards": [{"name": "a", "weight": 2.0}, {"name": "b"}], "run": {"output_dir": "y", "steps": 5}}
    assert differences([one, two]) == [
        ("kl", ["null", "-"]),
        ("rewards.0.weight", ["1.0", "2.0"]),
        ("rewards.1.name", ["-", "b"]),
    ]


def test_curves_of_many_steps_are_means_that_keep_both_ends() -> None:
    metrics = {"steps": list(range(1, 102)), "times": list(range(101)), "metrics": {"x": [None, *range(100)]}}
    few = thin(metrics, 12)
    assert len(few["steps"]) == 12 and few["steps"][0] == 1
    assert (few["steps"][-1], few["metrics"]["x"][0], few["metrics"]["x"][-1]) == (101, None, 99)
    # The 99 values between the ends are dealt to ten means of ten, or of nine, without a gap.
    assert few["metrics"]["x"][1] == pytest.approx(np.mean(range(0, few["steps"][1] - 1)))
    assert thin(metrics, 101) == metrics


def test_steps_are_spread_evenly_however_many_are_taken() -> None:
    order = list(spread(list(range(1, 18))))
    assert order[:5] == [17, 1, 9, 13, 5]
    assert sorted(order) == list(range(1, 18))
    assert list(spread([])) == [] and list(spread([4])) == [4] and list(spread([4, 5])) == [5, 4]


def test_a_page_keeps_within_its_budget_and_says_what_it_left_out(tmp_path: Path) -> None:
    make_stage(tmp_path / "run", 4)
    add_rollouts(tmp_path / "run", steps=range(1, 12))
    whole = embed_rollouts(tmp_path / "run", "x")
    assert len(whole.steps) == 11 and whole.notes == []
    some = embed_rollouts(tmp_path / "run", "x", budget=4 * len(whole.chunks["x-11"]) + 100)
    assert [one["step"] for one in some.steps] == [1, 6, 8, 11]
    assert sum(map(len, some.chunks.values())) <= 4 * len(whole.chunks["x-11"]) + 100
    assert some.notes[0].startswith("Rollouts of 4 of the 11 steps on file are in this page, the newest among them")
    none = embed_rollouts(tmp_path / "run", "x", budget=0)
    assert [one["step"] for one in none.steps] == [11]


def test_tokens_of_few_steps_and_the_ends_of_long_texts_are_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "STEPS_WITH_TOKENS", 2)
    monkeypatch.setattr(embedding, "MOST_TOKENS", 5)
    monkeypatch.setattr(embedding, "MOST_EPISODES", 3)
    make_stage(tmp_path / "run", 4)
    add_rollouts(tmp_path / "run", steps=range(1, 4))
    found = embed_rollouts(tmp_path / "run", "x")
    assert [(one["step"], one["kept"], one["total"], one["has_tokens"]) for one in found.steps] == [
        (1, 3, 24, True),
        (2, 3, 24, False),
        (3, 3, 24, True),
    ]
    # Completions of two tokens each: the third would be the sixth token.
    assert ["tokens" in one for one in unpack(found.chunks["x-1"])["episodes"]] == [True, True, False]
    assert found.notes == [
        "Of 3 steps the first 3 rollouts are in this page.",
        "Tokens and logprobs are in this page for 2 steps, chosen evenly.",
    ]


def test_a_damaged_file_of_rollouts_is_named_on_the_page(tmp_path: Path) -> None:
    make_stage(tmp_path / "run", 4)
    add_rollouts(tmp_path / "run", steps=(1, 2))
    (tmp_path / "run" / "rollouts" / "step_000002.parquet").write_bytes(b"PAR1")
    view = view_of(write_report(tmp_path / "run").read_text())
    assert [one["step"] for one in view["rollouts"]] == [1]
    assert len(view["notes"]) == 1 and "step_000002.parquet cannot be read" in view["notes"][0]


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
    text = shorten("a" * MOST_CHARACTERS + "b" * MOST_CHARACTERS)
    assert (
        text.startswith("aaa") and text.endswith("bbb") and f"[... {MOST_CHARACTERS} characters left out ...]" in text
    )


def test_null_is_shown_as_null_and_not_as_0_or_as_an_earlier_value(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    rows = [
        {"step": 0, "time": 1.0, "eval/heldout/pass@1": 0.5},
        {"step": 1, "time": 2.0, "reward/mean": 0.25, "reward/judge/mean": None, "staleness/max": 0.0},
        {"step": 2, "time": 3.0, "reward/mean": None, "reward/judge/mean": None, "eval/heldout/pass@1": None},
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    view = view_of(write_report(tmp_path / "run").read_text())
    assert ["reward/mean", "null", "0.250 at step 1"] in view["tiles"]
    assert "reward/mean" not in view["last"]
    assert view["unchanging"] == [["null", ["reward/judge/mean"]], ["0", ["staleness/max"]]]
    assert view["evaluations"] == [["heldout/pass@1", 0, 0.5, 2, None]]
