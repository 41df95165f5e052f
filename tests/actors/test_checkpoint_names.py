from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlflow.actors.checkpoint_names import to_checkpoint, to_model


@pytest.fixture(scope="module")
def model(tiny_moe_dir) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_moe_dir)


def assert_same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert some.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in some.items())


@pytest.mark.parametrize("origin", ["from_pretrained", "from_config"])
def test_weights_are_named_as_in_the_file_that_transformers_writes(tiny_moe_dir, model, origin):
    if origin == "from_config":
        weights = model.state_dict()
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_moe_dir))
        model.load_state_dict(weights)
    stored = load_file(tiny_moe_dir / "model.safetensors")
    assert "model.layers.2.mlp.experts.7.up_proj.weight" in stored
    assert_same(dict(to_checkpoint(model, model.named_parameters())), stored)


def test_the_way_back_leads_to_the_model(tiny_moe_dir, model):
    stored = load_file(tiny_moe_dir / "model.safetensors")
    assert_same(dict(to_model(model, stored.items())), dict(model.named_parameters()))


def test_a_model_that_read_fused_experts_sends_the_same_names(tmp_path, tiny_moe_dir, model):
    model.save_pretrained(tmp_path, save_original_format=False)
    fused = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(dict(to_checkpoint(fused, fused.named_parameters())), load_file(tiny_moe_dir / "model.safetensors"))


def test_no_more_than_a_layer_is_held_at_a_time(model):
    taken: list[str] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in model.named_parameters():
            taken.append(name)
            yield name, parameter.detach()

    for name, _ in to_checkpoint(model, weights()):
        if name.startswith("model.layers.0."):
            assert not any(other.startswith("model.layers.2.") for other in taken)


def test_names_of_models_without_experts_stay(tiny_model_dir):
    dense = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    named = list(dense.named_parameters())
    for convert in (to_checkpoint, to_model):
        converted = list(convert(dense, iter(named)))
        assert [name for name, _ in converted] == [name for name, _ in named]
        assert all(one is other for (_, one), (_, other) in zip(converted, named, strict=True))


def test_names_that_mean_nothing_to_the_model_are_left_alone(model):
    assert dict(to_model(model, [("model.layers.9.extra", torch.ones(1))])) == {"model.layers.9.extra": torch.ones(1)}
