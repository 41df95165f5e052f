"""How completions are drawn: parameters from the recipe, seeds from names."""

from __future__ import annotations

import hashlib
from typing import Any

from rlflow.data.tokenizer import stop_token_ids
from rlflow.recipe import ModelBlock, Recipe
from rlflow.types import Limits, SamplingParams


def sampling_params(recipe: Recipe, tokenizer: Any, model: ModelBlock) -> SamplingParams:
    """Of completions that are trained."""
    rollout, sampling = recipe.rollout, recipe.sampling
    return SamplingParams(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop_token_ids=stop_token_ids(tokenizer, model),
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        stop=tuple(sampling.stop),
    )


def episode_limits(recipe: Recipe, max_new_tokens: int) -> Limits | None:
    """When episodes whose turns have at most so many tokens end that are not over; None without an environment."""
    block = recipe.environment
    if block is None:
        return None
    return Limits(block.max_turns, recipe.episode_tokens(max_new_tokens), recipe.data.max_prompt_tokens)


def sample_seed(run_seed: int, prompt_id: str, epoch: int, index: int) -> int:
    """63-bit seed of one sample, from names alone: who generates it, and when, cannot matter."""
    text = f"{run_seed}/{prompt_id}/{epoch}/{index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
