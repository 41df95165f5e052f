"""How every causal architecture of the installed transformers is run: packed, one sequence at a time, or refused.

    python benchmarks/architectures.py docs/architectures.md      # or names of architectures, to see those alone

Each is made tiny, with windows shorter than the texts and weights large enough for a leak to show. Logprobs of three
packed sequences, and the gradient of a weighted sum of them, are compared with those of an untouched copy of the model
that transformers runs one sequence at a time.
"""

from __future__ import annotations

import copy
import logging
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from rlflow.actors.train_engines.probe import choose_passes, use_own_attention
from rlflow.actors.train_engines.token_model import TokenModel

VOCABULARY, SECONDS, MOST_PARAMETERS = 64, 60, 30_000_000
LENGTHS = (7, 23, 12)
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

LATENT = {"num_key_value_heads": 4, "head_dim": 8}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ["axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "youtu"],
        LATENT,
    ),
    **dict.fromkeys(["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "kimi_linear", "olmo_hybrid"], LINEAR),
    "minimax": LINEAR | {"block_size": 8},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts_per_tok": 1, "mamba_d_state": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_ssm": 64, "mamba_d_head": 16},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "nemotron_h": {"hybrid_override_pattern": "M*"},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "falcon": {"alibi": True},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "attention_head_size": 16},
    "rembert": {"input_embedding_size": 64, "output_embedding_size": 64},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 1,
    },
}
"""What an architecture wants beside small sizes."""


def main() -> None:
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _give_up)
    document = Path(sys.argv[1]) if len(sys.argv) == 2 and sys.argv[1].endswith(".md") else None
    names = sys.argv[1:] if document is None and len(sys.argv) > 1 else list(NAMES)
    rows = []
    for name in names:
        signal.alarm(SECONDS)
        kind, said = judge(name)
        signal.alarm(0)
        rows.append(f"| `{name}` | {kind} | {said} |")
        print(rows[-1], flush=True)
    if document is not None:
        text = document.read_text()
        head, _, _ = text.partition("| architecture |")
        document.write_text(head + "\n".join(["| architecture | how | why |", "|---|---|---|", *rows]) + "\n")


def judge(name: str) -> tuple[str, str]:
    """How an architecture is run, and what is to be said of it."""
    try:
        model = build(name)
    # Some want parts that are not installed, or cannot be small.
    except Exception as error:
        return "not tried", f"a small one cannot be made: {_short(error)}"
    if sum(parameter.numel() for parameter in model.parameters()) > MOST_PARAMETERS:
        return "not tried", "a small one is too large"
    plain: Any = copy.deepcopy(model)
    use_own_attention(plain)
    module = TokenModel(model)
    try:
        choose_passes(module, torch.device("cpu"))
    except ValueError as error:
        return "refused", _short(error, named=False)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    ours = torch.cat(module.probe(texts))
    theirs = torch.cat([TokenModel.probe_plain(SimpleNamespace(model=plain), text) for text in texts])  # pyright: ignore
    apart = float((ours - theirs).abs().max())
    one, other = _gradient(model, ours), _gradient(plain, theirs)
    turned = float((one - other).norm() / other.norm())
    if not (apart < 1e-4 and turned < 1e-4):
        return "WRONG", f"logprobs differ by {apart:.2g}, gradients by {turned:.2g}"
    return {"packed": "packed", "padded": "padded", "alone": "one at a time"}[module.passes.way], module.passes.reason


def build(name: str) -> Any:
    make: Any = CONFIG_MAPPING[name]
    default = make()
    given = _sizes_of(default)
    if "text_config" in default.sub_configs:
        given["text_config"] = _sizes_of(default.text_config)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(make(**given | OWN.get(name, {}))).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.0 if "embed" in key else parameter.shape[-1] ** -0.5)
            elif key.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model


def _sizes_of(config: Any) -> dict[str, Any]:
    known = {*config.to_dict(), *vars(config), *config.attribute_map}
    return {key: size for key, size in SMALL.items() if key in known}


def _gradient(model: Any, logprobs: torch.Tensor) -> torch.Tensor:
    loss = (logprobs * torch.linspace(-1, 1, len(logprobs))).sum()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


def _short(error: Exception, named: bool = True) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split() if named else str(error).split())
    text = text.replace("|", "/")
    return text if len(text) <= 160 else text[:157] + "..."


def _give_up(*_: Any) -> None:
    raise TimeoutError(f"it takes over {SECONDS} s")


if __name__ == "__main__":
    main()
