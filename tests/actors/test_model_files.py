"""config.json in the words of transformers 4.57 as well as 5: fields as published models of the time have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlflow.actors.model_files import save_model, with_old_names

THETA = 1000000.0
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FACTORS = {"short_factor": [1.5] * 8, "long_factor": [3.0] * 8}
LAYERS = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": THETA},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("model_type", "fields", "old"),
    [
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}}, {"rope_theta": THETA}),
        (
            "llama",
            {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        ),
        (
            "phi",
            {"rope_parameters": {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.5}},
            {"rope_theta": THETA, "partial_rotary_factor": 0.5},
        ),
        (
            "gpt_neox",
            {"rope_parameters": {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.5}},
            {"rotary_emb_base": THETA, "rotary_pct": 0.5},
        ),
        (
            "phi3",
            {
                "original_max_position_embeddings": 32,
                "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS},
            },
            {"rope_theta": 1e4, "rope_scaling": {"type": "longrope", **FACTORS}},
        ),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}},
            {"rope_theta": THETA},
        ),
        (
            "gemma3_text",
            {"rope_parameters": LAYERS, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16},
            {
                "rope_theta": THETA,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        (
            "qwen3_moe",
            {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
            {"num_experts": 4, "rope_theta": 1e4},
        ),
    ],
)
def test_old_names_have_the_values_of_the_new_ones_and_change_nothing_for_version_5(
    tmp_path: Path, model_type: str, fields: dict[str, Any], old: dict[str, Any]
):
    config: Any = AutoConfig.for_model(model_type, **SIZES, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    save_model(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    names = ("rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_emb_base", "rotary_pct", "num_experts")
    names = (*names, "partial_rotary_factor")
    missing = {"partial_rotary_factor"} - old.keys()
    assert {name: written[name] for name in names if name in written and name not in missing} == old
    assert written["torch_dtype"] == written["dtype"] == "float32"
    again: Any = AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters | config.rope_parameters == again.rope_parameters
    tokens = torch.arange(28)[None]
    with torch.no_grad():
        one, other = (
            of.eval()(tokens).logits for of in (model, AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"))
        )
    assert torch.equal(one, other)


def test_transformers_reads_a_model_that_caps_attentions_logits_with_the_cap(tmp_path: Path):
    """Its default attention leaves it out."""
    config: Any = AutoConfig.for_model("gemma2", **SIZES, head_dim=16, attn_logit_softcapping=1.0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    save_model(model, tmp_path)
    tokens = torch.arange(28)[None]
    with torch.no_grad():
        served = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits
        uncapped = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")(tokens).logits
        torch.testing.assert_close(served, model(tokens).logits)
    assert (served - uncapped).abs().max() > 1e-2


def test_a_model_that_sees_has_the_old_names_of_its_text_model():
    config: Any = AutoConfig.for_model("gemma3", text_config={**SIZES, "rope_parameters": LAYERS, "head_dim": 16})
    fields = with_old_names(config, json.loads(config.to_json_string(use_diff=True)))
    assert fields["text_config"]["rope_theta"] == THETA
    assert fields["text_config"]["rope_local_base_freq"] == 1e4
