"""A metric on its way to the log: a number, and how its parts become one over ranks and over updates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple


class Metric(NamedTuple):
    """A part of a number: a micro-batch's, a rank's or an update's."""

    value: Any
    """A float; in a trainer a tensor of one number."""
    over_ranks: Literal["sum", "max"] = "sum"
    """Of micro-batches too. Shares of a mean, divided by the whole batch's denominator, are summed."""
    over_updates: Literal["mean", "max", "first"] = "mean"
    """Of one step. ``first`` is of before the policy moved."""


Metrics = Mapping[str, Metric]


def over_ranks(parts: Iterable[Metrics]) -> dict[str, Metric]:
    """The metrics of a batch, from those of its micro-batches or ranks; not all parts need have all names."""
    totals: dict[str, Metric] = {}
    for metrics in parts:
        for name, metric in metrics.items():
            if name not in totals:
                totals[name] = metric
                continue
            values = totals[name].value, metric.value
            totals[name] = metric._replace(value=max(values) if metric.over_ranks == "max" else sum(values))
    return totals


def over_updates(updates: Sequence[Metrics]) -> dict[str, float]:
    """The metrics of a step, from those of its updates, which all have the same names."""
    return {
        name: _OVER_UPDATES[metric.over_updates]([metrics[name].value for metrics in updates])
        for name, metric in updates[0].items()
    }


def values_of(metrics: Metrics) -> dict[str, float]:
    """The numbers alone."""
    return {name: metric.value for name, metric in metrics.items()}


_OVER_UPDATES = {"mean": lambda values: sum(values) / len(values), "max": max, "first": lambda values: values[0]}
