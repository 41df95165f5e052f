"""Arithmetic with a calculator: the tool, and rows in which it is used, and in which it is not."""

from __future__ import annotations

import random
from typing import Any

HELD_OUT = 0.1
TOOL = {
    "type": "function",
    "function": {
        "name": "multiply",
        "description": "Multiplies two numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "The first number."},
                "b": {"type": "integer", "description": "The second number."},
            },
            "required": ["a", "b"],
        },
        "return": {"type": "integer"},
    },
}


def multiply(a: int, b: int) -> int:
    """Multiplies two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b


def problems(split: str = "train", rows: int | None = None) -> list[dict[str, Any]]:
    """Products of two-digit numbers, each in one of the splits."""
    draw = random.Random(0)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    draw.shuffle(pairs)
    held_out = int(HELD_OUT * len(pairs))
    chosen = pairs[:held_out] if split == "heldout" else pairs[held_out:]
    return [{"prompt": f"{a}*{b}=", "solution": str(a * b), "a": a, "b": b} for a, b in chosen[:rows]]


def mixed_answers(with_tool: float = 0.3) -> list[dict[str, Any]]:
    """The training problems with answers, some of them by the calculator and most without."""
    draw = random.Random(1)
    rows = []
    for problem in problems():
        messages: list[dict[str, Any]] = [{"role": "user", "content": problem["prompt"]}]
        if draw.random() < with_tool:
            arguments = {"a": problem["a"], "b": problem["b"]}
            call = {"type": "function", "function": {"name": "multiply", "arguments": arguments}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "name": "multiply", "content": problem["solution"]})
        messages.append({"role": "assistant", "content": problem["solution"]})
        rows.append({"messages": messages, "tools": [TOOL]})
    return rows
