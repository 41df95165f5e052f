"""What a reference of the data states, whatever it is wrapped in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def ground_truth(reference: Any) -> Any:
    """Returns what a reference states: of a mapping its ``ground_truth`` (the ``reward_model`` column of verl's data),
    of a list with one item that item, and anything else as it is. None where there is none."""
    if isinstance(reference, Mapping):
        return ground_truth(reference.get("ground_truth"))
    if isinstance(reference, list | tuple) and len(reference) == 1:
        return ground_truth(reference[0])
    return reference
