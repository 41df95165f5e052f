"""Whether ranks can share a model's tokens (Ulysses, arXiv 2309.14509), from its config alone. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlflow.recipe.architectures import why_not_packed

_HEADS = ("num_attention_heads", "n_head", "num_heads")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_ROTARY = ("rope_parameters", "rope_scaling")
_BY_LENGTH = ("dynamic", "longrope")


def sharing_problem(config: Mapping[str, Any], ranks: int) -> str | None:
    """Why so many ranks cannot share a micro-batch's tokens, and what to do; None when they can, or it is not said.

    Args:
        config: Fields of a transformers config.
    """
    if reason := why_not_packed(config):
        return f"ranks can share what attention alone mixes ({reason}): set trainer.sequence_parallel: 1"
    if isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    for block in _rotary_blocks(config):
        if (kind := _kind(block)) in _BY_LENGTH:
            return (
                f"its rotary embedding ({kind}) depends on the longest sequence, and a rank sees a part of it: set "
                "trainer.sequence_parallel: 1"
            )
    heads = next((config[name] for name in _HEADS if isinstance(config.get(name), int)), None)
    if heads is None:
        return None
    key_value_heads = config.get("num_key_value_heads")
    return heads_problem(heads, key_value_heads if isinstance(key_value_heads, int) else heads, ranks)


def split_problem(config: Mapping[str, Any]) -> str | None:
    """Why a model's width cannot be divided into its attention heads; None when it can, or the fields are not there."""
    if isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    heads = next((config[name] for name in _HEADS if isinstance(config.get(name), int)), None)
    if heads is None:
        return None
    width = next((config[name] for name in _WIDTHS if isinstance(config.get(name), int)), None)
    if heads < 1 or (width is not None and not isinstance(config.get("head_dim"), int) and width % heads):
        return f"a width of {width} does not divide into {heads} attention heads"
    shared = config.get("num_key_value_heads")
    if isinstance(shared, int) and (shared < 1 or heads % shared):
        return f"{heads} attention heads do not divide over num_key_value_heads: {shared}"
    return None


def heads_problem(heads: int, key_value_heads: int, ranks: int) -> str | None:
    """Why attention heads cannot be dealt to so many ranks, and what to do; None when they can.

    Each rank has the same number of heads, and of key-value heads or, of fewer than ranks, a copy of one.
    """
    if _divides(heads, key_value_heads, ranks):
        return None
    possible = ", ".join(str(n) for n in range(1, heads + 1) if _divides(heads, key_value_heads, n))
    return (
        f"{heads} attention heads and {key_value_heads} key-value heads do not divide over {ranks} ranks: set "
        f"trainer.sequence_parallel to one of {possible}"
    )


def _divides(heads: int, key_value_heads: int, ranks: int) -> bool:
    return heads % ranks == 0 and (key_value_heads % ranks == 0 or ranks % key_value_heads == 0)


def longest_with_one_rotation(config: Mapping[str, Any]) -> int | None:
    """The number of tokens up to which sequences of any length have the same rotary embedding; None: it never changes.

    Args:
        config: Fields of a transformers config.
    """
    if isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    trained = config.get("max_position_embeddings")
    limits = [
        block.get("original_max_position_embeddings", config.get("original_max_position_embeddings", trained))
        if _kind(block) == "longrope"
        else trained
        for block in _rotary_blocks(config)
        if _kind(block) in _BY_LENGTH
    ]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def _rotary_blocks(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Of the whole model, or of each kind of layer."""
    for name in _ROTARY:
        parameters = config.get(name)
        if isinstance(parameters, dict):
            yield from (block for block in (parameters, *parameters.values()) if isinstance(block, dict))


def _kind(rotary: Mapping[str, Any]) -> object:
    return rotary.get("rope_type", rotary.get("type"))
