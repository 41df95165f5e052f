"""Block expansion: what is written computes what the model did, new layers alone are trained, and all else is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    OPTConfig,
    OPTForCausalLM,
)

from rlflow.actors.expanded_model import write_expanded
from rlflow.recipe import ModelBlock
from rlflow.recipe.expand_block import ExpandBlock, LayerOrigin

IDS = torch.tensor([[3, 7, 11, 5, 9, 2, 30, 31, 8, 4]])


@torch.no_grad()
def logits_of(directory: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(directory).eval()(IDS).logits


def expanded(directory: Path, target: Path, **expand: Any) -> Path:
    write_expanded(ModelBlock(path=str(directory), expand=ExpandBlock(**expand)), target)
    return target


def test_new_layers_stand_behind_each_group_of_layers():
    old, new = (lambda i: LayerOrigin(i, False)), (lambda i: LayerOrigin(i, True))
    assert ExpandBlock(new_layers=2).layers(4) == [old(0), old(1), new(1), old(2), old(3), new(3)]
    two = ExpandBlock(new_layers=2, groups=1).layers(2)
    assert two == [old(0), old(1), new(1), new(1)]


@pytest.mark.parametrize("fixture", ["tiny_model_dir", "tiny_moe_dir"])
def test_an_expanded_model_computes_what_the_model_did_to_the_bit(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path
):
    directory = request.getfixturevalue(fixture)
    target = expanded(directory, tmp_path / "model", new_layers=2, groups=1)
    assert torch.equal(logits_of(target), logits_of(directory))
    more = len(AutoModelForCausalLM.from_pretrained(target).model.layers)
    assert more == len(AutoModelForCausalLM.from_pretrained(directory).model.layers) + 2
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (directory, target)]
    assert tokenizers[0]("ab").input_ids == tokenizers[1]("ab").input_ids
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


def test_layers_keep_their_kinds_of_attention(tmp_path: Path):
    """Of Gemma 3 one layer in so many attends to all tokens, the others to a window."""
    kinds = ["sliding_attention", "full_attention"]
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=4, layer_types=kinds, initializer_range=0.3,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "base")
    target = expanded(tmp_path / "base", tmp_path / "model", new_layers=2)
    assert AutoModelForCausalLM.from_pretrained(target).config.layer_types == [kinds[0]] * 2 + [kinds[1]] * 2
    assert torch.equal(logits_of(target), logits_of(tmp_path / "base"))


def test_layers_that_change_what_they_add_nothing_to_are_refused_and_nothing_is_left(tmp_path: Path):
    """OPT-350M normalizes after it adds."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32,
        max_position_embeddings=64, do_layer_norm_before=False, init_std=0.3,
    )  # fmt: skip
    model = OPTForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="OPTForCausalLM with new layers computes other logits than before"):
        expanded(tmp_path / "base", tmp_path / "model", new_layers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_layers_that_are_not_cut_into_groups_are_refused_with_numbers_that_divide(tiny_model_dir: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"the model's 2 layers are not cut into 3 groups.*such as 1, 2"):
        expanded(tiny_model_dir, tmp_path / "model", new_layers=3)


def test_weights_of_layers_are_written_once_where_they_were_and_once_in_the_copy(tiny_model_dir: Path, tmp_path: Path):
    base = load_file(tiny_model_dir / "model.safetensors")
    found = load_file(expanded(tiny_model_dir, tmp_path / "model", new_layers=2) / "model.safetensors")
    for name, values in found.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        source = name if layer is None else name.replace(f"layers.{layer}.", f"layers.{layer // 2}.")
        is_zero = layer in (1, 3) and ("o_proj" in name or "down_proj" in name)
        assert torch.equal(values, torch.zeros_like(values) if is_zero else base[source]), name
