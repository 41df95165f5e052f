"""Tiny models of random weights that hear, whole directories that transformers loads, and recordings."""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np

from tests.seeing_models import TEXT
from tests.vision_models import tokenizer_of

RATE = 16_000
FAMILIES = ["qwen2_audio", "audioflamingo3"]
OTHERS = ["glmasr", "musicflamingo", "qwen3_asr"]
_TEMPLATE = (
    "{{%- for message in messages %}}{{{{- '<|im_start|>' + message.role + '\\n' }}}}"
    "{{%- if message.content is string %}}{{{{- message.content }}}}{{%- else %}}{{%- for part in message.content %}}"
    "{{%- if 'audio' in part or 'audio_url' in part %}}{{{{- '{placeholder}' }}}}"
    "{{%- elif 'text' in part %}}{{{{- part.text }}}}{{%- endif %}}"
    "{{%- endfor %}}{{%- endif %}}{{{{- '<|im_end|>\\n' }}}}{{%- endfor %}}"
    "{{%- if add_generation_prompt %}}{{{{- '<|im_start|>assistant\\n' }}}}{{%- endif %}}"
)
_PLACEHOLDERS = {"qwen2_audio": "<|audio_bos|><|AUDIO|><|audio_eos|>"}
"""Of the others ``<sound>``."""


def recording(seconds: float, seed: int = 0, rate: int = RATE, channels: int = 1, width: int = 2) -> bytes:
    """A WAV file of random whole numbers of so many bytes."""
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, (int(seconds * rate), channels, width), dtype=np.uint8).tobytes()
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw)
    return buffer.getvalue()


def write_hearing_processor(directory: Path, family: str) -> Any:
    """Tokenizer, chat template and processor of a family, hearing windows of two seconds; returns the processor."""
    from transformers import AutoConfig, WhisperFeatureExtractor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    special = ("<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>", "<sound>")
    template = _TEMPLATE.format(placeholder=_PLACEHOLDERS.get(family, "<sound>"))
    named = {"audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>", "audio_token": "<sound>"}
    tokenizer = tokenizer_of(special, template, "<|im_end|>", named if family in OTHERS else {})
    extractor: Any = WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    if family == "qwen3_asr":
        from transformers import Qwen3ASRFeatureExtractor

        extractor = Qwen3ASRFeatureExtractor(feature_size=8)
    kind = PROCESSOR_MAPPING[type(AutoConfig.for_model(family))]
    options = {"audio_token": "<sound>"} if family in ("glmasr", "musicflamingo") else {}
    if family == "musicflamingo":
        options |= named
    processor = kind(extractor, tokenizer, chat_template=template, **options)
    processor.save_pretrained(directory)
    config = {"model_type": family, "audio_token_id": processor.audio_token_id, "audio_config": {}}
    (directory / "config.json").write_text(json.dumps(config))
    return processor


def write_hearing_model(directory: Path, family: str = "qwen2_audio", scale: float = 0.2) -> Path:
    """A model whose weights are large enough for sound to show in its logprobs."""
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    processor = write_hearing_processor(directory, family)
    kinds = {"glmasr": "llama", "qwen3_asr": "qwen3"}
    text: dict[str, Any] = {"model_type": kinds.get(family, "qwen2"), **TEXT, "vocab_size": len(processor.tokenizer)}
    tower: dict[str, Any] = {"num_mel_bins": 8}
    if family in ("qwen2_audio", "qwen3_asr"):
        tower |= {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}
    else:
        # GLM-ASR joins four positions, by the width of the tower's MLP.
        tower |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    if family == "qwen3_asr":
        tower |= {"output_dim": 64, "downsample_hidden_size": 8}
    elif family != "glmasr":
        tower["max_source_positions"] = 100
    if family == "musicflamingo":
        tower["model_type"] = "audioflamingo3_encoder"
    name = "audio_token_index" if family == "qwen2_audio" else "audio_token_id"
    config = AutoConfig.for_model(family, audio_config=tower, text_config=text, **{name: processor.audio_token_id})
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, scale)
    model.save_pretrained(directory)
    return directory
