"""A transformers model as a directory that transformers and vLLM load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlflow.data.tokenizer import GENERATION_CONFIG


def save_model(model: Any, directory: Path, weights: dict[str, Any] | None = None) -> None:
    """``save_pretrained``, with the generation config that the model was loaded with.

    Args:
        weights: By name; the model's own when left out.
    """
    from transformers import GenerationConfig

    if not model.can_generate():
        model.save_pretrained(directory, state_dict=weights)
        _note_dtype(model, directory, weights)
        return
    own = model.generation_config
    # transformers loads settings that contradict each other, as several published models have, and refuses to save
    # them.
    model.generation_config = GenerationConfig()
    model.save_pretrained(directory, state_dict=weights)
    model.generation_config = own
    _note_dtype(model, directory, weights)
    save_generation_config(model, directory)


def save_generation_config(model: Any, directory: Path) -> None:
    """Writes the generation config of a model that generates, as it is."""
    model.generation_config.to_json_file(directory / GENERATION_CONFIG, use_diff=True)


def _note_dtype(model: Any, directory: Path, weights: dict[str, Any] | None) -> None:
    """In config.json, that of the weights written: a trainer may hold them in more bits than it hands out."""
    if weights:
        model.config.dtype = next(iter(weights.values())).dtype
        model.config.save_pretrained(directory)
