"""Any architecture of transformers, made tiny: sizes by the names that configs have for them, and what some want.

Windows are shorter than the texts of the benchmark, and weights large enough for a leak to show.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCABULARY, MOST_PARAMETERS = 64, 30_000_000
SIZES = {
    64: "hidden_size d_model n_embd dim emb_dim embedding_dim embedding_size lru_width mamba_d_ssm word_embed_proj_dim",
    96: "intermediate_size ffn_dim d_ff n_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff block_ff_dim",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_key_value_heads num_experts_per_tok moe_topk moe_k linear_num_key_heads linear_num_value_heads mamba_expand "
    "bos_token_id decoder_start_token_id",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts num_buckets",
    1: "n_group topk_group first_k_dense_replace moe_num_shared_experts n_shared_experts num_shared_experts "
    "mamba_n_groups n_groups eos_token_id is_decoder",
    16: "head_dim q_lora_rank kv_lora_rank v_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head "
    "mamba_chunk_size mamba_head_dim chunk_size hidden_size_per_layer_input",
    32: "moe_intermediate_size shared_expert_intermediate_size",
    8: "qk_rope_head_dim qk_nope_head_dim mamba_n_heads mamba_d_state mamba_num_heads ssm_state_size state_size "
    "rotary_dim",
    256: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions "
    "max_sequence_length",
    6: "sliding_window attention_chunk_size attention_window_size window_size",
    0: "pad_token_id num_kv_shared_layers use_mamba_kernels",
    3: "conv_L_cache",
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
}
SMALL: dict[str, Any] = {}
for _size, _names in SIZES.items():
    SMALL |= dict.fromkeys(_names.split(), _size)
SMALL |= {"is_decoder": True, "use_mamba_kernels": False, "hidden_size": 64, "vocab_size": VOCABULARY}

VISION = {"num_hidden_layers": 1, "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
"""Of a vision tower."""
FOR_VLLM = SMALL | {"head_dim": 32, "num_key_value_heads": 1, "moe_intermediate_size": 32}
FOR_VLLM |= dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"], 2)
FOR_VLLM |= {"attention_chunk_size": 32, "qk_nope_head_dim": 24}
"""Sizes that vLLM's CPU kernels have."""
PART = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": VOCABULARY,
}
"""Of a model that is made of several."""
LATENT = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
SPARSE = LINEAR | {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        [
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "longcat_flash",
            "minicpm3",
            "youtu",
        ],
        LATENT,
    ),
    **dict.fromkeys(["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"], LINEAR),
    "kimi_linear": LINEAR | LATENT,
    "minimax": LINEAR | {"block_size": 8},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts_per_tok": 1, "mamba_d_state": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_ssm": 64, "mamba_d_head": 16},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "nemotron_h": {"hybrid_override_pattern": "M*"},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "route_scale": 1.0},
    "glm4_moe": {"head_dim": 32},
    "hy_v3": {"first_k_dense_replace": 1, "expert_hidden_dim": 32},
    "minimax_m2": {"rotary_dim": 8, "scoring_func": "sigmoid", "use_routing_bias": True},
    "gemma4_text": {"num_experts": None},
    "qwen3_5": {"text_config": LINEAR},
    "qwen4_exp": {"text_config": SPARSE},
    "qwen4_exp_text": SPARSE,
    "qwen3_5_moe": {"text_config": LINEAR},
    "codegen": {"n_head": 4, "num_attention_heads": 4},
    "dbrx": {
        "d_model": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "diffllama": {"num_key_value_heads": 2},
    "cohere_compass_text": {
        "head_dim": 16,
        "logit_scale": 0.25,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "phi4_multimodal": {
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "nemo_conv_channels": 32,
        }
    },
    "xlnet": {"d_head": 16, "d_inner": 96},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_dt_rank": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "blt": {"patch_in_forward": False, "encoder_hash_byte_group_vocab": 64}
    | dict.fromkeys(["patcher_config", "encoder_config", "decoder_config", "global_config"], PART),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "falcon": {"alibi": True, "ffn_hidden_size": 256},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "attention_head_size": 16},
    "rembert": {"input_embedding_size": 64, "output_embedding_size": 64},
    "minimax_m3_vl_text": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 1,
    },
}
"""What an architecture wants beside small sizes."""


_A_DRAFT = "it drafts for another model, whose hidden states and cache it reads"
_A_SOUND = "it writes sound, in several tokens at a time, from another model's states of a text"
NO_MODEL = dict.fromkeys(["gemma4_assistant", "gemma4_unified_assistant"], _A_DRAFT) | dict.fromkeys(
    ["musicgen", "musicgen_melody"], _A_SOUND
)
"""What is no language model by itself."""


def build(name: str, sizes: dict[str, Any] = SMALL) -> Any:
    """A model of small random weights that are large enough for a leak to show, in evaluation mode.

    Args:
        sizes: Of its config, where it has a field of that name.

    Raises:
        Exception: Of any kind: its code wants what is not installed, or cannot be small.
        ValueError: It is too large, or no language model.
    """
    if name in NO_MODEL:
        raise ValueError(NO_MODEL[name])
    make: Any = CONFIG_MAPPING[name]
    default = make()
    own = OWN.get(name, {})
    given = _sizes_of(default, sizes)
    if "text_config" in default.sub_configs:
        given["text_config"] = _sizes_of(default.text_config, sizes) | own.get("text_config", {})
        own = {key: value for key, value in own.items() if key != "text_config"}
    if getattr(default, "vision_config", None) is not None:
        given["vision_config"] = _sizes_of(default.vision_config, VISION)
    torch.manual_seed(0)
    config = make(**given | own)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"a small one has {size // 1_000_000} million parameters")
    model: Any = AutoModelForCausalLM.from_config(config).float().eval()
    # Of some, the language model has a part of it.
    model.whole_config = config
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.0 if "embed" in key else parameter.shape[-1] ** -0.5)
            elif key.endswith(("bias", "sinks")):
                parameter.normal_(0, 0.1)
    return model


def _sizes_of(config: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    known = {*config.to_dict(), *vars(config), *config.attribute_map}
    return {key: size for key, size in sizes.items() if key in known}
