"""Parameters counted from a config are those of the model that transformers makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlflow.memory import UnknownShape, shape_of

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12}


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "qwen3_moe", **EXPERTS},
        {"model_type": "qwen3_moe", **EXPERTS, "mlp_only_layers": [0, 3], "tie_word_embeddings": True},
        {"model_type": "qwen3_moe", **EXPERTS, "mlp_only_layers": [1], "decoder_sparse_step": 2},
        {"model_type": "qwen3_moe", **EXPERTS, "attention_bias": True},
        {"model_type": "qwen2_moe", **EXPERTS, "shared_expert_intermediate_size": 20, "head_dim": 8},
        {"model_type": "mixtral", "num_local_experts": 3},
        {"model_type": "qwen3"},
    ],
    ids=["experts", "dense layers", "sparse steps", "biases", "shared expert", "mixtral", "dense"],
)
def test_parameters_of_a_config_are_those_of_the_model(fields: dict[str, Any]):
    config = AutoConfig.for_model(**SIZES | fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape_of(SIZES | fields).parameters == model.num_parameters()
    assert shape_of(config.to_dict()).parameters == model.num_parameters()


def test_a_mixture_without_a_number_of_experts_is_not_counted():
    with pytest.raises(UnknownShape, match="its config has no num_experts"):
        shape_of({"model_type": "qwen3_moe", **SIZES})
