"""Tiny language models of architectures that differ in what packed sequences must not share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 40
LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
GPT2: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

PACKED: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": GPT2,  # learned positions
    "gemma3_text": LLAMA | {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": LLAMA | {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "cohere2": LLAMA | {"logit_scale": 0.25, "sliding_window": 6},
    "mixtral": LLAMA | EXPERTS,
    "gemma2": LLAMA | {"sliding_window": 6, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gpt_oss": LLAMA | EXPERTS | {"sliding_window": 6},  # attention sinks
}
PADDED: dict[str, dict[str, Any]] = {
    "lfm2": LLAMA | {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_ff_dim": 48},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "pad_token_id": 0},
    "granitemoehybrid": LLAMA | EXPERTS | MAMBA | {"layer_types": ["mamba", "attention"], "logits_scaling": 2.0},
    "qwen3_next": LLAMA
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "llama4_text": LLAMA | EXPERTS | {"attention_chunk_size": 6, "intermediate_size_mlp": 48},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0},  # ALiBi
    "gptj": GPT2 | {"rotary_dim": 4},
    "stablelm": {key: value for key, value in LLAMA.items() if key != "head_dim"},
}


def write(directory: Path, kind: str, config: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """Random weights that are large enough for a leak to show; returns the model, in evaluation mode."""
    torch.manual_seed(seed)
    made = CONFIG_MAPPING[kind](vocab_size=VOCABULARY, **config)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    embeddings = model.get_input_embeddings()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        nn.init.normal_(embeddings.weight)
    model.save_pretrained(directory)
    return model
