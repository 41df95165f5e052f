"""Does the completion have the asked form? Each returns 1 or 0 and looks at nothing but the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rlflow.rewards.answers import last_boxed

THINK_ANSWER = r"<think>.*?</think>\s*<answer>.*?</answer>"
REACT = r"<think>.*?</think>\s*Action:.*?Action Input:.*?"
HASHES_AT_END = re.compile(r"####[ \t]*[-+]?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?\s*\Z")


def pattern_format(
    prompts: Sequence[Any],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    pattern: str = THINK_ANSWER,
    **columns: Any,
) -> list[float]:
    """1 where the whole completion matches the pattern (`re.fullmatch`, the dot matches line breaks too).

    ms-swift's `format` is this default. TRL's `think_format_reward` asks for no answer tags:
    ``pattern: "<think>(?!.*<think>).*?</think>.*"``.

    Args:
        pattern: A regular expression.
    """
    compiled = re.compile(pattern, re.DOTALL)
    return [float(compiled.fullmatch(completion) is not None) for completion in completions]


def react_format(
    prompts: Sequence[Any], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any
) -> list[float]:
    """1 where the completion is a thought and a tool call: think tags, ``Action:``, ``Action Input:`` (ms-swift)."""
    return pattern_format(prompts, completions, completion_ids, pattern=REACT)


def answer_format(
    prompts: Sequence[Any], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any
) -> list[float]:
    """1 where the completion ends in ``#### number``, as GSM8K's solutions do, and says so once."""
    return [float(text.count("####") == 1 and HASHES_AT_END.search(text) is not None) for text in completions]


def boxed_format(
    prompts: Sequence[Any], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any
) -> list[float]:
    r"""1 where the completion holds one ``\boxed{...}``, closed and not empty."""
    rewards = []
    for text in completions:
        boxed = last_boxed(text)
        rewards.append(float(text.count(r"\boxed") == 1 and boxed is not None and boxed.content.strip() != ""))
    return rewards
