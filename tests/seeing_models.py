"""Tiny vision-language models of random weights, whole directories that transformers and vLLM load."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.vision_models import write_processor

NEEDS_TORCHVISION = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="the Qwen-VL processors need torchvision"
)
FAMILIES = [pytest.param("qwen3_vl", marks=NEEDS_TORCHVISION), "idefics3"]
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
}


def write_seeing_model(directory: Path, family: str = "qwen3_vl", scale: float = 0.2) -> Path:
    """A model whose weights are large enough for pictures to show in its logprobs.

    Args:
        family: qwen3_vl, qwen2_5_vl or idefics3.
        scale: Standard deviation of the weights.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    processor = write_processor(directory, family)
    tokenizer = processor.tokenizer
    config = seeing_config(family, len(tokenizer), tokenizer.convert_tokens_to_ids)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, scale)
    model.save_pretrained(directory)
    return directory


def seeing_config(family: str, vocab_size: int, id_of: Any) -> Any:
    text = {**TEXT, "vocab_size": vocab_size, "pad_token_id": id_of("<|endoftext|>")}
    if family == "idefics3":
        from transformers import Idefics3Config

        return Idefics3Config(
            text_config={"model_type": "llama", **text},
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "patch_size": 8,
                "image_size": 32,
            },
            image_token_id=id_of("<image>"),
            scale_factor=2,
            tie_word_embeddings=False,
        )
    rotary: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    text["rope_parameters"] = rotary | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
    tokens = {
        "image_token_id": id_of("<|image_pad|>"),
        "video_token_id": id_of("<|video_pad|>"),
        "vision_start_token_id": id_of("<|vision_start|>"),
        "vision_end_token_id": id_of("<|vision_end|>"),
    }
    tower: dict[str, Any] = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 64,
    }
    if family == "qwen3_vl":
        from transformers import Qwen3VLConfig

        tower |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        return Qwen3VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=True, **tokens)
    from transformers import Qwen2_5_VLConfig

    tower |= {"window_size": 16, "fullatt_block_indexes": [2]}
    text["rope_parameters"] = rotary | {"mrope_section": [8, 4, 4]}
    return Qwen2_5_VLConfig(text_config=text, vision_config=tower, **tokens)
