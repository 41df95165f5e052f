"""The directory of a model that starts from random weights: config, tokenizer, and the processor of one that sees."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlflow.data.errors import DataError
from rlflow.data.tokenizer import CHARACTER_TEMPLATE, build_character_tokenizer
from rlflow.recipe import ModelBlock

PLACEHOLDERS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
"""The config's field -> the special token, of the Qwen-VL models."""
VISION_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""As CHARACTER_TEMPLATE, with pictures and videos among the parts of a content."""
PROCESSORS = {
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
}
MOST_PIXELS = 1 << 20
"""Of a picture, where the recipe names no ``max_pixels``."""


def sees(model: ModelBlock) -> bool:
    """Whether a new model has a tower for pictures."""
    return "vision_config" in (model.architecture or {})


def write_new_model(model: ModelBlock, path: Path) -> None:
    """Config, tokenizer and processor of ``model.architecture``, without weights.

    Raises:
        DataError: It has a tower, and is of no kind for which a processor is made here.
    """
    assert model.architecture is not None and model.characters is not None
    tokenizer = build_character_tokenizer(model.characters, VISION_TEMPLATE if sees(model) else CHARACTER_TEMPLATE)
    if sees(model):
        tokenizer.add_special_tokens({"additional_special_tokens": list(PLACEHOLDERS.values())})
        (path / "processor_config.json").write_text(json.dumps(_processor(model), indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(path)
    of_the_tokenizer = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = {"tie_word_embeddings": True, **model.architecture, **of_the_tokenizer, "dtype": model.dtype}
    if sees(model):
        config |= {name: tokenizer.convert_tokens_to_ids(token) for name, token in PLACEHOLDERS.items()}
        config["text_config"] = {**config.get("text_config", {}), **of_the_tokenizer}
        del config["vocab_size"]
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _processor(model: ModelBlock) -> dict[str, Any]:
    """processor_config.json, with the patches of the tower; a picture smaller than one merged patch is enlarged."""
    assert model.architecture is not None
    kind, tower = model.architecture["model_type"], model.architecture["vision_config"]
    if kind not in PROCESSORS:
        raise DataError(
            f"model.architecture: a new model that takes pictures has model_type {' or '.join(PROCESSORS)}, not {kind}."
        )
    patches = _patches(tower)
    smallest = (patches["patch_size"] * patches["merge_size"]) ** 2
    size = {"shortest_edge": smallest, "longest_edge": max(smallest, model.max_pixels or MOST_PIXELS)}
    processor, video = PROCESSORS[kind]
    return {
        "processor_class": processor,
        "image_processor": {"image_processor_type": "Qwen2VLImageProcessor", "size": size, **patches},
        "video_processor": {"video_processor_type": video, "size": size, **patches},
    }


def _patches(tower: Mapping[str, Any]) -> dict[str, Any]:
    named = {name: tower.get(name) for name in ("patch_size", "temporal_patch_size", "spatial_merge_size")}
    if missing := [name for name, size in named.items() if not isinstance(size, int)]:
        raise DataError(f"model.architecture: vision_config needs {', '.join(missing)}: pictures are cut by it.")
    patch, frames, merge = named.values()
    return {"patch_size": patch, "temporal_patch_size": frames, "merge_size": merge}
