"""Tiny vision-language models of random weights, with the processors, tokens and templates of their families."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
IDEFICS_TOKENS = (
    *("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
QWEN_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' or 'image' in part or 'image_url' in part %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part.type == 'video' or 'video' in part %}{{- '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif 'text' in part %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""As SmolVLM's: content is always a list of parts."""


def picture(width: int, height: int, seed: int = 0, format: str = "PNG") -> bytes:
    """A file of random pixels."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def video(width: int, height: int, frames: int, seed: int = 0) -> bytes:
    """Frames of random pixels, two a second or, by the seed, fewer, as a row's video travels."""
    from rlflow.data.video_archive import Video, pack

    pictures = tuple(picture(width, height, 100 * seed + index) for index in range(frames))
    return pack(Video(pictures, tuple(range(frames)), 2.0 / max(1, seed), frames))


def write_processor(directory: Path, family: str) -> Any:
    """Tokenizer, chat template and processor of a family; returns the processor."""
    from rlflow.torchvision_operators import install

    install()
    if family == "idefics3":
        from transformers import Idefics3ImageProcessor, Idefics3Processor

        tokenizer = tokenizer_of(IDEFICS_TOKENS, IDEFICS_TEMPLATE, "<end_of_utterance>")
        images = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
        processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=IDEFICS_TEMPLATE)
    else:
        from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen3VLProcessor
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

        tokenizer = tokenizer_of(QWEN_TOKENS, QWEN_TEMPLATE, "<|im_end|>")
        sizes: Mapping[str, Any] = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
        images = Qwen2VLImageProcessor(size={"shortest_edge": 64, "longest_edge": 64 * 64}, **sizes)
        frames: Mapping[str, Any] = {"size": {"shortest_edge": 64, "longest_edge": 4096}, "cap_pixels_per_frame": False}
        kind, video = (
            (Qwen3VLProcessor, Qwen3VLVideoProcessor)
            if family == "qwen3_vl"
            else (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor)
        )
        processor = kind(images, tokenizer, video(**sizes, **frames), chat_template=QWEN_TEMPLATE)
    processor.save_pretrained(directory)
    config = {"model_type": family, "image_token_id": processor.image_token_id, "vision_config": {}}
    if family != "idefics3":
        config["video_token_id"] = processor.video_token_id
    (directory / "config.json").write_text(json.dumps(config))
    return processor


def tokenizer_of(
    special: tuple[str, ...], template: str, eos: str, named: Mapping[str, str] = MappingProxyType({})
) -> Any:
    """Byte-level BPE of a handful of merges.

    Args:
        named: Special tokens of further kinds.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["What is in the picture?\n\nUser: Assistant: user assistant system"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=dict(named),
    )
    tokenizer.chat_template = template
    return tokenizer
