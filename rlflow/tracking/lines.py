"""Metrics as lines of text for people: pure functions of numbers, used by the console."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

OF_SEQUENCES = ("classification/accuracy", "embedding/accuracy", "reranking/accuracy")
LOSSES_OF_SEQUENCES = ("loss/classification", "loss/embedding", "loss/reranking")
"""Of models that say something of whole sequences."""

FIELDS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("reward", 6, ("reward/mean",)),
    ("acc", 5, ("preference/accuracy", "kto/accuracy", *OF_SEQUENCES)),
    ("margin", 7, ("preference/margin", "kto/margin")),
    ("loss", 7, ("loss/total", "loss/sft", "loss/preference", "loss/kto", "loss/reward_model", *LOSSES_OF_SEQUENCES)),
    ("kl", 6, ("kl/ref", "kto/kl")),
    ("entropy", 6, ("entropy",)),
    ("len", 5, ("completion/mean_tokens",)),
)
"""What a step's line shows: label, width, and the first of these metrics that the step has."""

OF_ROLLOUTS = "loss/policy"
"""A step that has it is of a policy gradient, whose loss is near 0 whatever is learnt: it is not shown."""

HEADLINE = ("reward", "acc", "loss", "len")
"""Labels of `FIELDS` whose trend is shown."""

_BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"

THROUGHPUT = ("perf/tokens_per_s", "perf/generated_tokens_per_s", "perf/trained_tokens_per_s")

TROUBLES = (
    ("skipped", "trainer/skipped"),
    ("reward errors", "reward/error_fraction"),
)
"""Shown as a warning when above 0."""


def split_evaluations(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Set name -> metric -> value, of the keys ``eval/<set>/<metric>``."""
    sets: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        if key.startswith("eval/"):
            _, name, metric = key.split("/", 2)
            sets.setdefault(name, {})[metric] = value
    return sets


def step_fields(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """(label, padded value) pairs of a step's line, throughput last; empty when nothing was trained."""
    fields = [
        (label, f"{number(metrics[key]):<{width}}")
        for label, width, keys in FIELDS
        if (key := _shown(metrics, label, keys)) is not None
    ]
    if fields and (key := first_present(metrics, THROUGHPUT)) is not None:
        fields.append(("tok/s", f"{count(metrics[key]):<4}"))
    return fields


def headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """Label -> value of the few numbers that tell how a run goes."""
    found = {label: _shown(metrics, label, keys) for label, _, keys in FIELDS if label in HEADLINE}
    return {label: metrics[key] for label, key in found.items() if key is not None}


def sparkline(values: Sequence[float]) -> str:
    """A character a value, from the lowest block for the least to the highest; a space where it is not finite."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return " " * len(values)
    low, span = min(finite), max(finite) - min(finite)
    top = len(_BLOCKS) - 1

    def block(value: float) -> str:
        if not math.isfinite(value):
            return " "
        return _BLOCKS[round((value - low) / span * top)] if span > 0 else _BLOCKS[top // 2]

    return "".join(map(block, values))


def troubles(metrics: Mapping[str, float]) -> list[str]:
    """What went wrong in a step, e.g. ``skipped 1``."""
    return [f"{label} {number(metrics[key])}" for label, key in TROUBLES if key in metrics and metrics[key] > 0]


def first_present(metrics: Mapping[str, float], keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if key in metrics), None)


def _shown(metrics: Mapping[str, float], label: str, keys: tuple[str, ...]) -> str | None:
    """The metric behind a label, where the step has one that says something."""
    return None if label == "loss" and OF_ROLLOUTS in metrics else first_present(metrics, keys)


def changes(first: Mapping[str, float], last: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """(metric, value, change since the first measurement) of an evaluation; the change is empty when there is none."""
    rows = []
    for metric, value in last.items():
        if metric == "unscored_fraction" and not value > 0:
            continue
        moved = metric in first and math.isfinite(value - first[metric]) and value != first[metric]
        rows.append((metric, number(value), signed(value - first[metric]) if moved else ""))
    return rows


def number(value: float) -> str:
    """Four significant places at most, and no more than nine characters."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else str(value)
    size = abs(value)
    if size >= 1e5 or 0 < size < 1e-4:
        return f"{value:.1e}"
    if size >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.2f}" if size >= 10 else f"{value:.3f}" if size >= 0.01 or size == 0 else f"{value:.4f}"


def signed(value: float) -> str:
    text = number(value)
    return text if text.startswith("-") or value == 0 else f"+{text}"


def count(value: float) -> str:
    """A count in thousands or millions: 940, 1.2k, 38k, 2.5M."""
    if not math.isfinite(value):
        return "-"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            scaled = value / size
            return f"{scaled:.0f}{suffix}" if scaled >= 10 else f"{scaled:.1f}{suffix}"
    return f"{value:.0f}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds as on a stopwatch: 0:07, 12:33, 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def duration(seconds: float) -> str:
    """A duration in words: 41 s, 12 min, 1 h 2 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
