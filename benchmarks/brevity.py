"""A reward that an untrained model already varies in: short answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def brevity(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """1 for nothing, 0 for 400 characters."""
    return [1.0 - len(text) / 400 for text in completions]
