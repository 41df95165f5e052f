"""The longest sequence that a model's config allows, as vLLM derives it, and the longest that a recipe makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlflow.recipe import Recipe

_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
"""What architectures call the number of positions."""
_SCALED_ALREADY = {"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"}
"""Kinds of RoPE scaling that the number of positions has in it; others (linear, dynamic) multiply it by a factor."""
_DEFAULTS = {
    "gpt2": 1024,
    "gpt_bigcode": 1024,
    "gpt_neo": 2048,
    "gpt_neox": 2048,
    "llama": 2048,
    "opt": 2048,
    "phi": 2048,
    "qwen2": 32768,
    "qwen3": 32768,
    "qwen3_moe": 32768,
}
"""Of architectures whose config does not say, as that of a new model may."""


def position_limit(config: Mapping[str, Any]) -> int | None:
    """Tokens of the longest sequence; None where none is known.

    It is what vLLM accepts as ``max_model_len`` (vllm/config/model.py, _get_and_verify_max_len).

    Args:
        config: Fields of a transformers config, by the names of any of its versions.
    """
    text = config.get("text_config")
    config = text if isinstance(text, Mapping) else config
    given = [config[key] for key in _KEYS if isinstance(config.get(key), int)]
    if isinstance(config.get("model_max_length"), int):
        given = [config["model_max_length"]]
    limit = min(given) if given else _DEFAULTS.get(str(config.get("model_type")))
    if limit is None:
        return None
    if "gemma3" in str(config.get("model_type")):
        return limit
    factor = 1.0
    for rope in _rope_parameters(config):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in _SCALED_ALREADY:
            factor = rope.get("factor") or factor
    return int(limit * factor)


def longest_sequences(recipe: Recipe) -> dict[str, int]:
    """What makes the recipe's sequences so long -> tokens: a dotted key, or two that add up."""
    data = recipe.data
    trains_rows = not recipe.generates or recipe.trains_answers
    found = {"data.max_tokens": data.max_tokens} if trains_rows else {}
    if recipe.needs_rollouts:
        key = "rollout.max_new_tokens" if recipe.environment is None else "environment.max_tokens"
        found[f"data.max_prompt_tokens + {key}"] = data.max_prompt_tokens + recipe.max_completion_tokens
    for key, block in recipe.evaluations.items():
        if recipe.reward_of(block) is not None and block.max_new_tokens is not None:
            length = data.max_prompt_tokens + recipe.episode_tokens(block.max_new_tokens)
            found[f"data.max_prompt_tokens + {key}.max_new_tokens"] = length
    return found


def _rope_parameters(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Of each kind of layer that has its own, in the form of any version of transformers."""
    given = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(given, Mapping):
        return
    nested = [value for value in given.values() if isinstance(value, Mapping)]
    yield from nested or [given]
