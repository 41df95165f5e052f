"""Which metrics are drawn together, which numbers stand large above them, and where the seconds of a step went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from rlflow.tracking.history import Series, StageHistory, is_result
from rlflow.tracking.lines import OF_SEQUENCES, count, number, signed

PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Held-out", ("eval/*/pass@*",)),
    ("Held-out texts", ("eval/*/retrieval/*", "eval/*/reranking/*", "eval/*/sts/*", "eval/*/classification/*")),
    ("Accuracy", OF_SEQUENCES),
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
"""Charts in reading order: title, and patterns of the metrics in it. What no panel claims has one of its own."""

CONCURRENT_TIMES = frozenset({"time/step_s", "time/generate_s", "time/reward_s", "time/trainer_waits_s"})
"""The whole step, what workers measured themselves while the driver's ``rollout`` phase waited for them, and that wait
once more."""


@dataclass(frozen=True, slots=True)
class Panels:
    """The charts of a stage: (title, metrics) each."""

    main: list[tuple[str, list[str]]]
    more: list[tuple[str, list[str]]]
    """Of metrics that no panel claims."""
    unchanging: list[tuple[str, list[str]]]
    """("null" or "0", the metrics that were so at every step)."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the driver's step."""

    name: str
    key: str | None
    """Its metric; None for what no phase claims."""
    share: float
    """Of the time of all steps."""


def panels_of(stage: StageHistory) -> Panels:
    """Deals a stage's metrics to charts; times have a chart of their own."""
    series = {key: stage.series(key) for key in stage.keys if not key.startswith("time/")}
    null = [key for key, one in series.items() if not one.points]
    still = [key for key, one in series.items() if one.last == 0 and all(value == 0 for _, value in one.points)]
    zero = [key for key in still if not is_result(key)]
    unchanging = [(value, keys) for value, keys in (("null", null), ("0", zero)) if keys]
    left = {key: one for key, one in series.items() if key not in null and key not in zero}
    main = []
    for title, patterns in PANELS:
        keys = [key for pattern in patterns for key in left if fnmatchcase(key, pattern)]
        claimed = [left.pop(key) for key in dict.fromkeys(keys)]
        if claimed:
            main.append((title, [one.name for one in _without_twins(claimed)]))
    return Panels(main, [(key, [key]) for key in left], unchanging)


def phases_of(stage: StageHistory) -> list[Phase]:
    """Where the seconds of the steps went, the longest phase first; what came before the first step is left out."""
    keys = [key for key in stage.keys if key.startswith("time/") and key not in CONCURRENT_TIMES]
    sums: dict[str | None, float] = dict.fromkeys([*keys, None], 0.0)
    for row in stage.steps:
        if "time/step_s" not in row or row["step"] == 0:
            continue
        parts = {key: row[key] for key in keys if key in row and math.isfinite(row[key])}
        for key, seconds in parts.items():
            sums[key] += seconds
        sums[None] += max(0.0, row["time/step_s"] - sum(parts.values()))
    total = sum(sums.values())
    ordered = sorted((key for key in sums if sums[key]), key=lambda key: -sums[key])
    return [Phase("other" if key is None else phase_name(key), key, sums[key] / total) for key in ordered]


def phase_name(key: str) -> str:
    """``rollout`` of ``time/rollout_s``."""
    return key.removeprefix("time/").removesuffix("_s")


def tiles_of(stage: StageHistory) -> list[tuple[str, str, str]]:
    """(label, number, remark) of a page's large numbers."""
    tiles = []
    for metric, first_step, first, last_step, last in stage.evaluations():
        if "pass@" in metric:
            remark = (
                f"{signed(last - first)} since step {first_step:.0f}" if last_step > first_step else "measured once"
            )
            tiles.append((metric, shown_number(last), remark))
    for key in ("reward/mean", "preference/accuracy", "kto/accuracy", *OF_SEQUENCES, "loss/sft", "loss/reward_model"):
        series = stage.series(key)
        if series.points and (key != "loss/reward_model" or not tiles):
            step, value = series.points[0]
            tiles.append((key, shown_number(series.last), f"{number(value)} at step {step:.0f}"))
    for key in ("perf/generated_tokens_per_s", "perf/trained_tokens_per_s"):
        rates = sorted(value for _, value in stage.series(key).points)
        if rates:
            tiles.append((key.removeprefix("perf/"), count(rates[len(rates) // 2]), "median"))
    return tiles


def shown_number(value: float) -> str:
    """As on the console, but for what metrics.jsonl has null for."""
    return number(value) if math.isfinite(value) else "null"


def _without_twins(series: Sequence[Series]) -> list[Series]:
    """Leaves out a series that repeats an earlier one, as the only reward function repeats ``reward/mean``."""
    return list({(one.points, shown_number(one.last)): one for one in reversed(series)}.values())[::-1]
