"""A checkpoint that is not the model of its config.json is refused by everything that loads one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlflow.actors.train_engines.scalar_model import load_scalar_model
from rlflow.actors.train_engines.token_model import load_token_model
from rlflow.recipe import AdapterBlock, ModelBlock

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
CPU = torch.device("cpu")

Weights = dict[str, torch.Tensor]
Write = Callable[..., Path]


def policy(path: Path) -> None:
    load_token_model(ModelBlock(path=str(path)), seed=0, device=CPU)


def adapted(path: Path) -> None:
    load_token_model(ModelBlock(path=str(path), adapter=AdapterBlock(rank=2)), seed=0, device=CPU)


def critic(path: Path) -> None:
    load_scalar_model(ModelBlock(path=str(path)), seed=0, device=CPU)


LOADERS = pytest.mark.parametrize("load", [policy, adapted, critic])


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a model's weights, changed, beside the config.json of a Llama."""

    def write(model: Any, change: Callable[[Weights], Any] = lambda weights: None) -> Path:
        model.save_pretrained(tmp_path / "model")
        weights = load_file(tmp_path / "model" / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
        LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return write


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


@LOADERS
def test_missing_weights_are_refused(load: Callable, write: Write):
    path = write(llama(), lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"model is no LlamaFor\w+: it lacks model\.layers\.1\.mlp\.up_proj\.weight\."):
        load(path)


@LOADERS
@pytest.mark.parametrize("whole", [True, False], ids=["with its head", "without its head"])
def test_biases_that_would_be_left_out_are_refused(load: Callable, write: Write, whole: bool):
    config = Qwen2Config(**SIZES)
    path = write(Qwen2ForCausalLM(config) if whole else Qwen2Model(config))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.k_proj\.bias, .* and 3 more, which that leaves out"):
        load(path)


@LOADERS
def test_norms_within_a_layer_that_would_be_left_out_are_refused(load: Callable, write: Write):
    path = write(Qwen3ForCausalLM(Qwen3Config(**SIZES)))
    with pytest.raises(ValueError, match=r"it has model\.layers\.0\.self_attn\.k_norm\.weight, .*leaves out"):
        load(path)


@LOADERS
def test_weights_of_another_shape_are_refused(load: Callable, write: Write):
    path = write(llama())
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 20}))
    with pytest.raises(
        ValueError, match=r"mlp\.down_proj\.weight has shape \[16, 24\], and config.json says \[16, 20\]"
    ):
        load(path)


@pytest.mark.parametrize("load", [policy, adapted])
def test_a_head_of_its_own_that_the_config_ties_is_refused(load: Callable, tmp_path: Path):
    """transformers leaves it apart, and vLLM drops it."""
    Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=False)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r'a head of its own, and its .* ties it .*"tie_word_embeddings": false'):
        load(tmp_path)


@LOADERS
def test_what_a_model_has_no_use_for_is_left_out(load: Callable, write: Write):
    """A vision tower, rotary frequencies, a mask, a layer for multi-token prediction, a head beside the head."""
    others = [
        "vision_tower.layers.0.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.0.self_attn.masked_bias",
        "model.layers.2.mlp.up_proj.weight",
        "score_of_experts.weight",
    ]
    load(write(llama(), lambda weights: weights.update({name: torch.ones(4) for name in others})))


def test_a_classifier_without_its_head_is_refused_and_a_language_model_gets_one(tiny_model_dir: Path, tmp_path: Path):
    critic(tiny_model_dir)
    shutil.copytree(tiny_model_dir, tmp_path / "classifier")
    config = json.loads((tiny_model_dir / "config.json").read_text())
    labels = {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    (tmp_path / "classifier" / "config.json").write_text(json.dumps(config | labels))
    with pytest.raises(ValueError, match=r"is no Qwen3ForSequenceClassification: it lacks score\.weight"):
        critic(tmp_path / "classifier")
