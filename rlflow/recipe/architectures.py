"""How architectures are run for training and scoring, from a model's config alone. No torch.

The actors find out by trying (rlflow.actors.train_engines.probe) and have the last word; this is what they find for
the architectures of transformers, made small (docs/architectures.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

_STATE = "its layers carry a state from token to token, which packed sequences would share"
_OWN = "its attention is its own, not the one that packs"
_SPARSE = "its layers choose the tokens that they attend to"
_REASONS = {
    _STATE: "bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe mamba mamba2 minimax "
    "nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text "
    "qwen3_5_text qwen3_next recurrent_gemma zamba zamba2 zaya",
    _OWN: "bart bigbird_pegasus blenderbot blenderbot-small bloom codegen doge falcon gpt_neo gpt_neox_japanese "
    "gptj llama4 llama4_text marian mbart moshi mpt mvp nemotron openai-gpt pegasus phimoe plbart stablelm trocr "
    "got_ocr2 xglm",
    _SPARSE: "axk2 deepseek_v32 deepseek_v4 glm_moe_dsa hy_v4 minimax_m3_vl_text qwen4_exp qwen4_exp_text",
}
NOT_PACKED = {kind: reason for reason, kinds in _REASONS.items() for kind in kinds.split()}
"""`model_type` -> why."""


_HEAD = "it makes logits of hidden states in a way of its own"
_REFUSED_FOR = {
    _HEAD: "bert big_bird camembert data2vec-text electra ernie inkling_text megatron-bert modernbert-decoder "
    "prophetnet rembert roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl",
    "it is no left-to-right model as it is configured": "cpmant xlm xlnet",
    "in evaluation mode it gives no gradients": "ctrl git reformer rwkv",
    "its own forward pass fails on a text's token ids alone": "blt xlstm xmod",
}
REFUSED = {kind: reason for reason, kinds in _REFUSED_FOR.items() for kind in kinds.split()}
"""`model_type` -> why no trainer, reference, critic or reward model takes it."""

_LATENT = "it has latent attention, whose weights vLLM rearranges once they are loaded, so that it cannot take new ones"
_NO_VLLM_FOR = {
    _LATENT: "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa hy_v4 longcat_flash youtu",
    "vLLM cannot load its experts by the names that they have": "dbrx",
    "vLLM lacks its positions of several dimensions": "cohere_compass_text",
    "vLLM leaves out the embeddings of its layers, and its logprobs are other ones": "gemma3n_text",
    "vLLM computes its attention otherwise, and its logprobs are other ones": "doge hrm_text jetmoe moshi",
}
NO_VLLM = {kind: reason for reason, kinds in _NO_VLLM_FOR.items() for kind in kinds.split()}
"""`model_type` -> why no rollouts are sampled by vLLM, on CPUs or GPUs."""
STATE_ON_CPU = (
    "its layers carry a state, which vLLM keeps only where prompts are read in pieces; on a CPU they are read whole"
)

_EXPERTS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
"""Fields that say how many experts a layer has."""

How = Literal["packed", "side by side", "refused"]


def how_run(config: Mapping[str, Any]) -> tuple[How, str]:
    """How sequences of a model go through it together, and why not packed. What is not known here is packed.

    Args:
        config: Fields of a transformers config.
    """
    text = config.get("text_config")
    kinds = [config.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None]
    if refused := next((REFUSED[kind] for kind in kinds if kind in REFUSED), None):
        return "refused", refused
    reason = next((NOT_PACKED[kind] for kind in kinds if kind in NOT_PACKED), None)
    return ("packed", "") if reason is None else ("side by side", reason)


def why_not_packed(config: Mapping[str, Any]) -> str | None:
    """None where sequences are packed, or where the architecture is not known here.

    Args:
        config: Fields of a transformers config.
    """
    how, reason = how_run(config)
    return None if how == "packed" else reason


def why_not_vllm(config: Mapping[str, Any], *, on_cpu: bool) -> str | None:
    """Why vLLM does not sample a model's rollouts, or None: vLLM itself has the last word on what is not known here.

    Args:
        config: Fields of a transformers config.
    """
    kind = config.get("model_type")
    if kind in NO_VLLM:
        return NO_VLLM[kind]
    return STATE_ON_CPU if on_cpu and NOT_PACKED.get(str(kind)) == _STATE else None


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether some layers of a model are mixtures of experts.

    Args:
        config: Fields of a transformers config.
    """
    return str(config.get("model_type")).endswith("_moe") or bool(_EXPERTS & config.get("text_config", config).keys())
