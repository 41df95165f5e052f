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
_TEMPLATE = (
    "{{%- for message in messages %}}{{{{- '<|im_start|>' + message.role + '\\n' }}}}"
    "{{%- if message.content is string %}}{{{{- message.content }}}}{{%- else %}}{{%- for part in message.content %}}"
    "{{%- if 'audio' in part or 'audio_url' in part %}}{{{{- '{placeholder}' }}}}"
    "{{%- elif 'text' in part %}}{{{{- part.text }}}}{{%- endif %}}"
    "{{%- endfor %}}{{%- endif %}}{{{{- '<|im_end|>\\n' }}}}{{%- endfor %}}"
    "{{%- if add_generation_prompt %}}{{{{- '<|im_start|>assistant\\n' }}}}{{%- endif %}}"
)
_PLACEHOLDERS = {"qwen2_audio": "<|audio_bos|><|AUDIO|><|audio_eos|>", "audioflamingo3": "<sound>"}


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
    from transformers import AudioFlamingo3Processor, Qwen2AudioProcessor, WhisperFeatureExtractor

    special = ("<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>", "<sound>")
    template = _TEMPLATE.format(placeholder=_PLACEHOLDERS[family])
    tokenizer = tokenizer_of(special, template, "<|im_end|>")
    kind = Qwen2AudioProcessor if family == "qwen2_audio" else AudioFlamingo3Processor
    processor = kind(WhisperFeatureExtractor(feature_size=8, chunk_length=2), tokenizer, chat_template=template)
    processor.save_pretrained(directory)
    config = {"model_type": family, "audio_token_id": processor.audio_token_id, "audio_config": {}}
    (directory / "config.json").write_text(json.dumps(config))
    return processor


def write_hearing_model(directory: Path, family: str = "qwen2_audio", scale: float = 0.2) -> Path:
    """A model whose weights are large enough for sound to show in its logprobs."""
    import torch
    from transformers import AudioFlamingo3Config, AutoModelForSeq2SeqLM, Qwen2AudioConfig

    processor = write_hearing_processor(directory, family)
    text: dict[str, Any] = {"model_type": "qwen2", **TEXT, "vocab_size": len(processor.tokenizer)}
    tower: dict[str, Any] = {"num_mel_bins": 8, "max_source_positions": 100}
    if family == "qwen2_audio":
        tower |= {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}
        config: Any = Qwen2AudioConfig(audio_config=tower, text_config=text, audio_token_index=processor.audio_token_id)
    else:
        tower |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        config = AudioFlamingo3Config(audio_config=tower, text_config=text, audio_token_id=processor.audio_token_id)
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, scale)
    model.save_pretrained(directory)
    return directory
