"""report.html: what runs did, on one page that needs nothing but a browser.

Its sources are in page/: a template, a style sheet and three scripts. Everything about the runs is data in it,
compressed JSON that its own script unpacks and shows as text; a content security policy lets nothing else run.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlflow.text_files import write_text
from rlflow.tracking import charts
from rlflow.tracking.embedding import BUDGET_BYTES, embed_rollouts, pack
from rlflow.tracking.history import HistoryError, Series, StageHistory, read_stages
from rlflow.tracking.page_data import failures, metrics_since, plain, stage_summary

SOURCES = Path(__file__).parent / "page"
SCRIPTS = ("charts.js", "episodes.js", "page.js")
MOST_POINTS = 2000
"""Curves of more steps are embedded as means of neighbours."""
Tell = Callable[[int, int], None]
NOT_COMPARED = frozenset({"run.output_dir"})
"""Keys in which two runs always differ."""


class ReportError(ValueError):
    """A page that cannot be written; the message says where, and what to do."""


def write_report(
    run_directory: Path,
    *,
    compare: Sequence[Path] = (),
    output: Path | None = None,
    tell: Tell = lambda done, total: None,
) -> Path:
    """Writes the page of a run, or of several over each other.

    Args:
        run_directory: A stage's directory, or one whose directories are the stages of a run.
        compare: Further runs.
        output: The page; ``report.html`` in the run's directory when absent.
        tell: Called with how many steps' rollouts of a stage were read, and how many it has.

    Returns:
        The page's path.

    Raises:
        HistoryError: There is no run in a directory.
        ReportError: The page cannot be written.
    """
    page = render([run_directory, *compare], tell)
    path = run_directory / "report.html" if output is None else output
    try:
        write_text(path, page)
    except OSError as error:
        remedy = "name another file with -o" if output is None else "name one in a directory that is there and has room"
        raise ReportError(f"{path} cannot be written ({error.strerror}): {remedy}") from error
    return path


def render(runs: Sequence[Path], tell: Tell = lambda done, total: None) -> str:
    """The page's text.

    Raises:
        HistoryError: There is no run in a directory.
    """
    names = distinct_names(runs)
    stages = [(name, read_stages(run)) for name, run in zip(names, runs, strict=True)]
    matched = match_stages([of_run for _, of_run in stages])
    budget = BUDGET_BYTES // max(1, sum(len(group) for _, group in matched))
    chunks: dict[str, str] = {}
    shown = []
    for number, (name, group) in enumerate(matched):
        views = []
        for index, stage in group:
            view, of_rollouts = _view(stage, names[index], f"{number}-{index}", budget, tell)
            chunks |= of_rollouts
            views.append(view)
        differing = differences([stage.recipe for _, stage in group])
        shown.append({"name": name, "runs": views, "differences": differing})
    chunks["main"] = pack(plain({"stages": shown}))
    return _assemble(" and ".join(names) if len(names) > 1 else names[0], chunks)


def write_curve_svg(run_directory: Path, keys: Sequence[str], path: Path) -> None:
    """Draws metrics of a run as a picture that stands alone, for a README.

    Args:
        run_directory: A run, or a directory of stages: every stage that has a metric adds a line.
        keys: Metrics, e.g. ``eval/heldout/pass@1``.
        path: The SVG.

    Raises:
        HistoryError: There is no run, or no stage has one of the metrics.
        ReportError: The picture cannot be written.
    """
    stages = read_stages(run_directory)
    series: list[Series] = []
    for key in keys:
        having = [stage for stage in stages if stage.series(key).points]
        if not having:
            known = ", ".join(sorted({name for stage in stages for name in stage.keys}))
            raise HistoryError(f"{run_directory}: no step has {key!r}; there are {known}")
        for stage in having:
            series.append(replace(stage.series(key), name=key if len(stages) == 1 else f"{stage.name}: {key}"))
    try:
        write_text(path, charts.standalone(series))
    except OSError as error:
        raise ReportError(f"{path} cannot be written ({error.strerror}): name another file") from error


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """What the runs are called: the last part of their paths, with as many before it as tell them apart."""
    paths = [run.resolve().parts for run in runs]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise HistoryError(f"{runs[0]} is named twice: a run is compared with others")


def match_stages(runs: Sequence[Sequence[StageHistory]]) -> list[tuple[str, list[tuple[int, StageHistory]]]]:
    """Stages that are shown over each other: (name, [(which run, its stage)]), in the order of the first run.

    Those of one name belong together, and the only stage of a run belongs to the last of the first run's. A stage that
    no other run has stands alone.
    """
    first = runs[0]
    groups: dict[str, list[tuple[int, StageHistory]]] = {stage.name: [(0, stage)] for stage in first}
    for index, stages in enumerate(runs[1:], start=1):
        for stage in stages:
            name = stage.name
            if name not in groups and (len(stages) == 1 or len(first) == 1) and stage is stages[-1]:
                name = first[-1].name
            groups.setdefault(name, []).append((index, stage))
    return list(groups.items())


def differences(recipes: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The dotted keys in which recipes differ, each with its value in every one of them; "-" where it has none."""
    flat = [dict(_flatten(recipe)) for recipe in recipes]
    keys = sorted({key for one in flat for key in one} - NOT_COMPARED)
    rows = [(key, [one.get(key, "-") for one in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def thin(metrics: Mapping[str, Any], most: int = MOST_POINTS) -> dict[str, Any]:
    """`page_data.metrics_since` with at most ``most`` steps: means over equal numbers of neighbours, each at its last
    step; the first and the last step stay as they are."""
    steps = metrics["steps"]
    if len(steps) <= most:
        return dict(metrics)
    edges = [0, *(1 + round(i * (len(steps) - 2) / (most - 2)) for i in range(most - 1)), len(steps)]
    spans = list(pairwise(edges))
    last = [end - 1 for _, end in spans]
    return {
        "steps": [steps[i] for i in last],
        "times": [metrics["times"][i] for i in last],
        "metrics": {
            key: [_mean(values[start:end]) for start, end in spans] for key, values in metrics["metrics"].items()
        },
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(f"{sum(known) / len(known):.6g}") if known else None


def _view(stage: StageHistory, run: str, prefix: str, budget: int, tell: Tell) -> tuple[dict[str, Any], dict[str, str]]:
    """What the page's script is given of a stage, and the chunks of its rollouts."""
    embedded = embed_rollouts(stage.directory, prefix, budget, tell)
    metrics = metrics_since(stage.directory)
    view = stage_summary(stage) | {
        "run": run,
        "metrics": thin(metrics),
        "last": {key: series.last for key in stage.keys if math.isfinite((series := stage.series(key)).last)},
        "failures": failures(stage),
        "rollouts": embedded.steps,
        "notes": embedded.notes,
        "recipe_text": yaml.safe_dump(stage.recipe, sort_keys=False, width=100) if stage.recipe else "",
    }
    del view["recipe"], view["directory"]
    if len(metrics["steps"]) > MOST_POINTS:
        view["notes"].append(f"Curves are drawn through {MOST_POINTS} means of the {len(metrics['steps'])} steps.")
    return view, embedded.chunks


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, value as text) of every leaf of nested mappings and lists."""
    if isinstance(value, Mapping) and value:
        parts = value.items()
    elif isinstance(value, list) and any(isinstance(one, Mapping | list) for one in value):
        parts = enumerate(value)
    else:
        return [(prefix, "null" if value is None else str(value))] if prefix else []
    return [leaf for key, one in parts for leaf in _flatten(one, f"{prefix}.{key}" if prefix else str(key))]


def _assemble(title: str, chunks: Mapping[str, str]) -> str:
    style = charts.style_sheet()
    script = "\n".join((SOURCES / name).read_text(encoding="utf-8") for name in SCRIPTS)
    sources = f"script-src {_digest(script)}; style-src {_digest(style)}; img-src data:"
    policy = f"default-src 'none'; {sources}; base-uri 'none'"
    loader = FileSystemLoader(SOURCES)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("page.html").render(
        title=plain(title),
        policy=Markup(policy),
        style=Markup(style),
        script=Markup(script),
        chunks={name: Markup(text) for name, text in chunks.items()},
    )


def _digest(text: str) -> str:
    """A source of a content security policy: this inline text and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
