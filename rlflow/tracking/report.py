"""report.html: what a run did, on one page that needs nothing but a browser."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlflow.tracking import charts
from rlflow.tracking.history import HistoryError, Series, StageHistory, read_stages
from rlflow.tracking.lines import count, duration, number, signed
from rlflow.tracking.rollouts import RolloutRecord, read_errors, read_rollouts

SAMPLES = 3
"""So many of the best rollouts are shown, and of the worst."""
LONGEST_TEXT = 3000
"""Characters of a prompt or completion; the middle of a longer one is left out."""

SHOWN_FAILURES = 10
"""So many causes for which rewards failed are shown."""
FILES_OF_FAILURES = 50
"""So many rollout files, the newest that have some, are searched for them."""

PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Held-out", ("eval/*/pass@*",)),
    ("Reward", ("reward/mean", "reward/*/mean")),
    ("Preference accuracy", ("preference/accuracy", "kto/accuracy")),
    ("Implicit rewards", ("preference/chosen_reward", "preference/rejected_reward", "*/margin")),
    ("Loss", ("loss/*",)),
    ("KL", ("kl/*", "kto/kl")),
    ("Entropy, nats a token", ("entropy",)),
    ("Completion length, tokens", ("completion/mean_tokens", "completion/max_tokens", "eval/*/mean_tokens")),
    ("Fractions of completions", ("completion/*_fraction", "reward/*_fraction")),
    ("Groups without signal", ("group/zero_std_fraction",)),
    ("Clipped tokens", ("clip/*",)),
    ("Engine against trainer", ("mismatch/kl", "mismatch/logprob_abs_diff")),
    ("Staleness, policy versions", ("staleness/*",)),
    ("Gradient norm", ("trainer/grad_norm",)),
    ("Learning rate", ("trainer/learning_rate",)),
    ("Value model", ("value/*",)),
    ("Tokens per second", ("perf/*tokens_per_s",)),
)
"""Charts in reading order: title, and patterns of the metrics in it. What no panel claims is under `More metrics`."""

CONCURRENT_TIMES = frozenset({"time/step_s", "time/generate_s", "time/reward_s"})
"""The whole step, and what workers measured themselves while the driver's ``rollout`` phase waited for them."""


@dataclass(frozen=True, slots=True)
class Legend:
    name: str
    value: str
    color: str


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    legend: list[Legend]
    chart: Markup


def write_report(run_directory: Path) -> Path:
    """Writes ``report.html`` into a run directory, or into one whose directories are the stages of a run.

    Returns:
        The page's path.

    Raises:
        HistoryError: There is no run in the directory.
    """
    stages = read_stages(run_directory)
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"number": shown_number, "signed": signed, "shorten": shorten}
    page = environment.get_template("report.html").render(
        title=run_directory.resolve().name,
        stages=[_stage_view(stage) for stage in stages],
        light=Markup(charts.LIGHT),
        dark=Markup(charts.DARK),
    )
    path = run_directory / "report.html"
    temporary = path.with_name(".report.html.writing")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def write_curve_svg(run_directory: Path, keys: Sequence[str], path: Path) -> None:
    """Draws metrics of a run as a picture that stands alone, for a README.

    Args:
        run_directory: A run, or a directory of stages: every stage that has a metric adds a line.
        keys: Metrics, e.g. ``eval/heldout/pass@1``.
        path: The SVG.

    Raises:
        HistoryError: There is no run, or no stage has one of the metrics.
    """
    stages = read_stages(run_directory)
    series: list[Series] = []
    for key in keys:
        having = [stage for stage in stages if stage.series(key).points]
        if not having:
            known = ", ".join(sorted({name for stage in stages for name in stage.keys}))
            raise HistoryError(f"{run_directory}: no step has {key!r}; there are {known}")
        series += [stage.series(key, key if len(stages) == 1 else f"{stage.name}: {key}") for stage in having]
    path.write_text(charts.standalone(series), encoding="utf-8")


def shorten(text: str) -> str:
    """``text`` without its middle when it is long."""
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def shown_number(value: float) -> str:
    """As on the console, but for what metrics.jsonl has null for."""
    return number(value) if math.isfinite(value) else "null"


def _stage_view(stage: StageHistory) -> dict[str, object]:
    """What the template shows of a stage."""
    panels, rest, unchanging = _panels(stage)
    best, worst, rollout_file = _samples(stage)
    return {
        "name": stage.name,
        "facts": _facts(stage),
        "tiles": _tiles(stage),
        "evaluations": stage.evaluations(),
        "panels": panels,
        "rest": rest,
        "unchanging": unchanging,
        "failures": _failures(stage),
        "times": _time_panel(stage),
        "best": best,
        "worst": worst,
        "rollout_file": rollout_file,
        "recipe": yaml.safe_dump(stage.recipe, sort_keys=False, width=100) if stage.recipe else "",
    }


def _facts(stage: StageHistory) -> list[str]:
    recipe = stage.recipe
    facts = [] if not recipe else [recipe["algorithm"]["name"], recipe["model"]["path"] or "new model"]
    return [*facts, f"{stage.steps[-1]['step']:.0f} steps", duration(_seconds(stage))]


def _seconds(stage: StageHistory) -> float:
    """Time spent in steps, pauses between a stop and its resume left out."""
    return sum(seconds for _, seconds in stage.series("time/step_s").points)


def _tiles(stage: StageHistory) -> list[tuple[str, str, str]]:
    """(label, number, remark) of the page's large numbers."""
    tiles = []
    for metric, first_step, first, last_step, last in stage.evaluations():
        if "pass@" in metric:
            remark = (
                f"{signed(last - first)} since step {first_step:.0f}" if last_step > first_step else "measured once"
            )
            tiles.append((metric, shown_number(last), remark))
    for key in ("reward/mean", "preference/accuracy", "kto/accuracy", "loss/sft", "loss/reward_model"):
        series = stage.series(key)
        if series.points and (key != "loss/reward_model" or not tiles):
            step, value = series.points[0]
            tiles.append((key, shown_number(series.last), f"{number(value)} at step {step:.0f}"))
    for key in ("perf/generated_tokens_per_s", "perf/trained_tokens_per_s"):
        rates = sorted(value for _, value in stage.series(key).points)
        if rates:
            tiles.append((key.removeprefix("perf/"), count(rates[len(rates) // 2]), "median"))
    return tiles


def _panels(stage: StageHistory) -> tuple[list[Panel], list[Panel], list[tuple[str, list[str]]]]:
    """Charts of known metrics, charts of the others, and the metrics that were null or 0 at every step."""
    series = {key: stage.series(key) for key in stage.keys if not key.startswith("time/")}
    null = [key for key, one in series.items() if not one.points]
    zero = [key for key, one in series.items() if one.last == 0 and all(value == 0 for _, value in one.points)]
    unchanging = [(value, keys) for value, keys in (("null", null), ("0", zero)) if keys]
    left = {key: one for key, one in series.items() if key not in null and key not in zero}
    panels = []
    for title, patterns in PANELS:
        keys = [key for pattern in patterns for key in left if fnmatchcase(key, pattern)]
        claimed = [left.pop(key) for key in dict.fromkeys(keys)]
        if claimed:
            panels.append(_panel(title, _without_twins(claimed)))
    return panels, [_panel(key, [one]) for key, one in left.items()], unchanging


def _without_twins(series: Sequence[Series]) -> list[Series]:
    """Leaves out a series that repeats an earlier one, as the only reward function repeats ``reward/mean``."""
    return list({(one.points, shown_number(one.last)): one for one in reversed(series)}.values())[::-1]


def _panel(title: str, series: Sequence[Series]) -> Panel:
    shown = series[: charts.NUM_COLORS]
    legend = [Legend(one.name, shown_number(one.last), f"var(--s{i})") for i, one in enumerate(shown)]
    return Panel(title, legend, Markup(charts.line_chart(shown)))


def _time_panel(stage: StageHistory) -> Panel | None:
    """Where the seconds of each step went; what came before the first step is left out."""
    phases = [key for key in stage.keys if key.startswith("time/") and key not in CONCURRENT_TIMES]
    rows = []
    for row in stage.steps:
        if "time/step_s" not in row or row["step"] == 0:
            continue
        parts = {_phase(key): row[key] for key in phases if key in row and math.isfinite(row[key])}
        parts["other"] = max(0.0, row["time/step_s"] - sum(parts.values()))
        rows.append((row["step"], parts))
    if not rows:
        return None
    names = [*map(_phase, phases), "other"]
    sums = {name: sum(parts.get(name, 0.0) for _, parts in rows) for name in names}
    names = [name for name in sorted(names, key=lambda n: -sums[n]) if sums[name]]
    total = sum(sums.values())
    legend = [Legend(name, f"{sums[name] / total:.0%}", f"var(--s{i % 8})") for i, name in enumerate(names)]
    return Panel("Seconds a step", legend, Markup(charts.stacked_bars(rows, names)))


def _phase(key: str) -> str:
    return key.removeprefix("time/").removesuffix("_s")


def _failures(stage: StageHistory) -> list[tuple[str, int]]:
    """Why reward functions failed on rollouts that are on file, the most frequent cause first, and on how many."""
    with_some = {int(step) for step, value in stage.series("reward/error_fraction").points if value > 0}
    files = [path for path in stage.rollout_files() if int(path.stem.rpartition("_")[2]) in with_some]
    causes = Counter(error for path in files[-FILES_OF_FAILURES:] for error in read_errors(path))
    return causes.most_common(SHOWN_FAILURES)


def _samples(stage: StageHistory) -> tuple[list[RolloutRecord], list[RolloutRecord], str]:
    """The best and the worst rollouts of the newest file, one a prompt, and the file's name."""
    files = stage.rollout_files()
    if not files:
        return [], [], ""
    records = [record for record in read_rollouts(files[-1], tokens=False) if math.isfinite(record.reward)]
    records.sort(key=lambda record: record.reward)
    best = list({record.prompt_id: record for record in records}.values())
    best = sorted(best, key=lambda record: -record.reward)[:SAMPLES]
    worst = list({record.prompt_id: record for record in reversed(records) if record not in best}.values())
    return best, sorted(worst, key=lambda record: record.reward)[:SAMPLES], files[-1].name
