"""Metrics of the user's own: numbers that functions find in a step's groups of rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from rlflow.plugins import PluginError, load_plugin, naming
from rlflow.recipe.function_blocks import MetricBlock
from rlflow.types import Group


def own_metrics(blocks: Sequence[MetricBlock], groups: Sequence[Group]) -> dict[str, float]:
    """``metric/<name>`` of a function that returns a number, ``metric/<name>/<key>`` of one that returns several.

    Raises:
        PluginError: A function raises, or returns something else.
    """
    found: dict[str, float] = {}
    for block in blocks:
        function = load_plugin(block.plugin)
        with naming(block.plugin):
            value = function(groups, **block.args)
        found |= _named(block, value)
    return found


def _named(block: MetricBlock, value: Any) -> dict[str, float]:
    values = value if isinstance(value, Mapping) else {"": value}
    strange = [number for number in values.values() if not isinstance(number, Real)]
    if strange:
        kind = type(strange[0]).__name__
        raise PluginError(f"{block.plugin} returned a {kind}: return a number, or a mapping of names to numbers")
    return {f"metric/{block.name}" + (f"/{key}" if key else ""): float(number) for key, number in values.items()}
