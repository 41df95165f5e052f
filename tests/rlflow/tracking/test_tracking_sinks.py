"""What each tracker has on its disk after a run, read back by its own reader or from its format; no network."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wandb_files import history, runs

from rlflow.recipe import Recipe
from rlflow.tracking import missing_packages
from rlflow.tracking.child_tracker import SAMPLE_ROWS, ChildTracker
from rlflow.tracking.episodes import LONGEST_TEXT, Episode, Episodes, shortened
from rlflow.tracking.experiment import arguments_of
from rlflow.types import Prompt, Rollout, StepStats

EXPERIMENT = {"project": "arithmetic", "name": "baseline", "tags": ["grpo", "small"], "notes": "first try"}


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "SWANLAB_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio_data"))


def episode(text: str, reward: float, advantage: float, *, state: str = "trained", tokens: int = 3) -> Episode:
    prompt = Prompt("rows:0", np.arange(2, dtype=np.int32), [{"role": "user", "content": "What is 1 + 1?"}], {})
    sampled = np.array([False, False] + [True] * tokens)
    rollout = Rollout(
        token_ids=np.zeros(2 + tokens, np.int32),
        is_sampled=sampled,
        logprobs=np.zeros(2 + tokens, np.float32),
        versions=np.where(sampled, 0, -1).astype(np.int32),
        finish_reason="stop",
        text=text,
        rewards={"math": reward, "length": 0.5},
        reward=reward,
        error="",
    )
    return Episode(prompt, rollout, advantage, state)


def step_of(step: int) -> Episodes:
    return Episodes(
        step,
        [
            episode("two", 0.0, -1.0, tokens=1),
            episode("2 \ud800", 1.0, 1.0, tokens=3),
            episode("not scored", float("nan"), 0.0, state="masked", tokens=5),
        ],
    )


def track(name: str, directory: Path, recipe: Recipe, steps: range, said: list[str], *, ends: bool = True) -> None:
    arguments = arguments_of(name, recipe, directory)
    tracker = ChildTracker(name, arguments, directory / "logs" / f"{name}.log", say=said.append, finish_seconds=120)
    for step in steps:
        tracker.episodes(step_of(step))
        tracker.log(StepStats(step, {"reward/mean": step / 10, "loss/total": float("nan")}))
    if ends:
        tracker.finish({"best/pass@1": 0.5})
    tracker.close()


def only(paths: list[Path]) -> Path:
    (path,) = paths
    return path


@pytest.mark.slow
def test_wandb_has_steps_histograms_a_table_of_samples_and_what_the_run_is_called(
    tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    said: list[str] = []
    track("wandb", tmp_path, make_recipe(experiment=EXPERIMENT, stage="grpo"), range(1, 3), said)
    path = only(list(tmp_path.rglob("*.wandb")))
    rows = history(path)
    assert [(row["step"], row["reward/mean"]) for row in rows if "reward/mean" in row] == [(1, 0.1), (2, 0.2)]
    shown = next(row for row in rows if "rollouts/reward.bins" in row)
    assert shown["step"] == 1
    assert sum(shown["rollouts/completion_tokens.values"]) == 3
    # Rewards that there are, and advantages of what was trained.
    assert sum(shown["rollouts/reward.values"]) == sum(shown["rollouts/advantage.values"]) == 2
    assert (shown["rollouts/reward.bins"][0], shown["rollouts/reward.bins"][-1]) == (0.0, 1.0)
    tables = [json.loads(path.read_text()) for path in sorted(tmp_path.rglob("*.table.json"))]
    assert sorted(table["data"][0][0] for table in tables) == [1, 2]
    columns = ["step", "prompt", "completion", "reward", "reward/math", "reward/length", "advantage"]
    assert tables[0]["columns"][:7] == columns
    best, worst = tables[0]["data"]
    assert best[1:7] == ["What is 1 + 1?", "2 ?", 1.0, 1.0, 0.5, 1.0] and worst[2:4] == ["two", 0.0]
    about = runs(path)[0]
    assert (about.project, about.display_name, about.run_group) == ("arithmetic", "baseline/grpo", "baseline")
    assert (list(about.tags), about.notes) == (["grpo", "small"], "first try")
    assert (tmp_path / "logs" / "wandb.log").exists()


@pytest.mark.slow
def test_tensorboards_own_reader_finds_steps_histograms_and_samples_and_forgets_what_is_done_again(
    tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    said: list[str] = []
    track("tensorboard", tmp_path, make_recipe(), range(1, 5), said, ends=False)
    # Stopped behind the checkpoint of step 2, and resumed from it.
    track("tensorboard", tmp_path, make_recipe(), range(3, 6), said)
    assert said[0] == f"tensorboard: `tensorboard --logdir {tmp_path / 'tensorboard'}`"
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    found.Reload()
    scalars = [(event.step, round(event.value, 6)) for event in found.Scalars("reward/mean")]
    assert scalars == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4), (5, 0.5)]
    histogram = found.Histograms("rollouts/reward")[0].histogram_value
    assert (histogram.num, histogram.min, histogram.max, sum(histogram.bucket)) == (2, 0.0, 1.0, 2)
    assert len(histogram.bucket) == len(histogram.bucket_limit)
    samples = found.Tensors("rollouts/samples/text_summary")
    assert samples[-1].step == 5
    table = samples[0].tensor_proto.string_val[0].decode().splitlines()
    assert table[0].startswith("| prompt | completion | reward | reward/math |")
    assert table[2].startswith("| What is 1 + 1? | 2 ? | 1 | 1 | 0.5 | 1 |")
    recipe = found.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "name: grpo" in recipe and "hunter2-secret" not in recipe


def test_trackio_has_steps_and_a_resumed_run_goes_on_in_it(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    pytest.importorskip("trackio")
    import sqlite3

    said: list[str] = []
    recipe = make_recipe(experiment=EXPERIMENT)
    track("trackio", tmp_path, recipe, range(1, 3), said, ends=False)
    track("trackio", tmp_path, recipe, range(3, 5), said)
    assert said[0].startswith("trackio: `trackio show --project arithmetic`, run baseline-")
    with sqlite3.connect(only(list((tmp_path / "trackio_data").glob("arithmetic*.db")))) as database:
        logged = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    rows = [(name, step, json.loads(metrics)) for name, step, metrics in logged]
    assert {name for name, _, _ in rows} == {said[0].rpartition(" ")[2]}
    assert [(step, row["reward/mean"]) for _, step, row in rows if "reward/mean" in row] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 0.4),
    ]
    table = next(row["rollouts/samples"] for _, _, row in rows if "rollouts/samples" in row)
    assert "What is 1 + 1?" in json.dumps(table) and "rollouts/reward" in json.dumps([row for _, _, row in rows])


def test_swanlab_without_a_key_is_offline_and_has_steps(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    pytest.importorskip("swanlab")
    said: list[str] = []
    track("swanlab", tmp_path, make_recipe(experiment=EXPERIMENT), range(1, 3), said)
    assert said == [f"swanlab: offline: `swanlab sync` uploads what is in {tmp_path / 'swanlab'}"]
    content = b"".join(path.read_bytes() for path in (tmp_path / "swanlab").rglob("*") if path.is_file())
    assert b"reward/mean" in content and b"baseline" in content and b"hunter2-secret" not in content


def test_samples_go_from_the_best_to_the_worst_and_are_not_too_many_or_too_long() -> None:
    made = [episode("x" * 10_000, float(reward), 0.0) for reward in range(50)]
    rows = Episodes(7, made).samples(SAMPLE_ROWS)
    assert len(rows) == SAMPLE_ROWS and (rows[0]["reward"], rows[-1]["reward"], rows[0]["step"]) == (49.0, 0.0, 7)
    assert len(rows[0]["completion"]) <= LONGEST_TEXT
    assert [row["reward"] for row in Episodes(1, made[:2]).samples(SAMPLE_ROWS)] == [1.0, 0.0]
    assert [row["reward"] for row in Episodes(1, [episode("a", float("nan"), 0.0)]).samples(4)] == [None]
    assert Episodes(1, []).samples(4) == [] and Episodes(1, []).histograms() == {}


def test_a_shortened_text_keeps_its_beginning_and_its_end() -> None:
    text = "begins " + "x" * 100 + " the answer is 4"
    short = shortened(text, 40)
    assert len(short) == 40 and short.startswith("begins xxx") and short.endswith("answer is 4") and " ... " in short


def test_a_tracker_that_is_not_installed_is_named_with_its_place_and_the_remedy(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "trackio" else object())
    found: list[Any] = list(missing_packages(make_recipe(tracking=["console", "wandb", "trackio"])))
    remedy = "trackio is not installed here: pip install trackio (or 'rlflow[trackio]'), or remove it from the list"
    assert found == [("tracking.2", remedy)]
