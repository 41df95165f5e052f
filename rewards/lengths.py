"""Penalties on how long a completion is, and on how much it repeats itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal


def soft_overlong(
    prompts: Sequence[Any],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    cache_tokens: int,
    **columns: Any,
) -> list[float]:
    """Soft overlong punishment: a slope from 0 down to -1 over the last tokens before the limit.

    DAPO (arXiv 2503.14476), eq. 13, with L_max = ``max_tokens`` and L_cache = ``cache_tokens``:
    0 while ``|y| <= L_max - L_cache``, then ``(L_max - L_cache - |y|) / L_cache``, and -1 beyond L_max.
    TRL does the same; ms-swift's slope goes on below -1.

    Args:
        max_tokens: L_max, as a rule the recipe's ``rollout.max_new_tokens``.
        cache_tokens: L_cache, at most L_max; 0 punishes only what is longer than L_max.

    Raises:
        ValueError: ``cache_tokens`` is negative or larger than ``max_tokens``.
    """
    if not 0 <= cache_tokens <= max_tokens:
        raise ValueError(f"soft_overlong: cache_tokens {cache_tokens} must lie in 0..max_tokens ({max_tokens})")
    rewards = []
    for ids in completion_ids:
        excess = len(ids) - (max_tokens - cache_tokens)
        if excess <= 0:
            rewards.append(0.0)
        else:
            rewards.append(-1.0 if excess > cache_tokens else -excess / cache_tokens)
    return rewards


def repetition(
    prompts: Sequence[Any],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    ngram_size: int = 3,
    max_penalty: float = -1.0,
    unit: Literal["words", "tokens"] = "words",
    **columns: Any,
) -> list[float]:
    """Repeated n-grams: ``(1 - unique n-grams / n-grams) * max_penalty``; 0 for fewer than n units.

    After arXiv 2502.03373, appendix C.2, as one number a completion. ms-swift counts lower-cased words, TRL token ids.

    Args:
        ngram_size: n.
        max_penalty: What a completion of nothing but repetition approaches; at most 0.
        unit: What an n-gram consists of.

    Raises:
        ValueError: ``ngram_size`` is under 1, ``max_penalty`` over 0, or ``unit`` unknown.
    """
    if ngram_size < 1 or max_penalty > 0 or unit not in ("words", "tokens"):
        raise ValueError(
            f"repetition: ngram_size {ngram_size} must be at least 1, max_penalty {max_penalty} at most 0, "
            f"unit {unit!r} words or tokens"
        )
    sequences = completion_ids if unit == "tokens" else [text.lower().split() for text in completions]
    return [repeated_fraction(sequence, ngram_size) * max_penalty for sequence in sequences]


def repeated_fraction(sequence: Sequence[Any], ngram_size: int) -> float:
    """Share of the n-grams of a sequence that an earlier place already had, in [0, 1)."""
    count = len(sequence) - ngram_size + 1
    if count < 1:
        return 0.0
    unique = {tuple(sequence[start : start + ngram_size]) for start in range(count)}
    return 1.0 - len(unique) / count
