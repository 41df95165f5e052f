"""What `rlflow plan` counts of a vision tower is what transformers' towers have and keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from rlflow import activations
from rlflow.actor_memory import trainer_bytes
from rlflow.actors.adapters import load_adapted
from rlflow.actors.vision import part_finder
from rlflow.memory import shape_of, stored_shapes, with_adapter, with_trained_parts
from rlflow.recipe import AdapterBlock, ModelBlock, load_recipe
from rlflow.recipe.model_blocks import Part
from rlflow.tower_shape import tower_shape
from tests.seeing_models import NEEDS_TORCHVISION, seeing_config, write_seeing_model

FAMILIES = ["qwen3_vl", "qwen2_5_vl", "idefics3"]
PATCHES = 256


def build(family: str, layers: int, dtype: torch.dtype = torch.float32) -> Any:
    """The whole model, its tower of so many layers."""
    config = seeing_config(family, 300, lambda token: len(token))
    tower = config.vision_config
    if family == "idefics3":
        tower.num_hidden_layers = layers
    else:
        tower.depth = layers
        tower.deepstack_visual_indexes, tower.fullatt_block_indexes = [0], list(range(layers))
    return AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")


def kept_bytes(model: Any, dtype: torch.dtype) -> int:
    """Of all distinct tensors that the tower keeps of a picture of PATCHES, parameters aside."""
    tower = model.get_encoder(modality="image")
    parameters = {parameter.untyped_storage().data_ptr() for parameter in tower.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if "spatial_merge_size" in model.config.vision_config.to_dict():
            tower(torch.rand(PATCHES, 3 * 2 * 4 * 4, dtype=dtype), grid_thw=torch.tensor([[1, 16, 16]]))
        else:
            tower(torch.rand(PATCHES // 16, 3, 32, 32, dtype=dtype))
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_of_a_tower_keeps_what_is_counted_to_the_byte(family: str, dtype: torch.dtype):
    two, three = (build(family, layers, dtype) for layers in (2, 3))
    tower = tower_shape(two.config.to_dict(), {})
    assert tower is not None
    counted = PATCHES * activations.kept_by_tower(tower, dtype.itemsize)
    assert kept_bytes(three, dtype) - kept_bytes(two, dtype) == counted


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_tower_and_projector_are_told_by_the_names_in_the_files(family: str, tmp_path: Path):
    model = build(family, 3)
    model.save_pretrained(tmp_path)
    part_of, counts = part_finder(model), {"vision": 0, "projector": 0, "language": 0}
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    shape = shape_of(model.config.to_dict(), stored_shapes(tmp_path))
    assert shape.tower is not None
    assert (shape.tower.vision, shape.tower.projector) == (counts["vision"], counts["projector"])
    assert shape.parameters == sum(counts.values())
    for parts in (["language"], ["projector"], ["language", "projector", "vision"]):
        trained = with_trained_parts(shape, parts)
        assert trained.parameters - trained.frozen == sum(counts[part] for part in parts)


def test_parameters_of_a_model_that_is_not_here_are_counted_of_its_config():
    """Qwen3-VL-2B-Instruct's config: its tower has 405,412,864 parameters with its projectors."""
    tower = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16}
    tower |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "deepstack_visual_indexes": [5, 11, 17]}
    tower |= {"num_position_embeddings": 2304, "hidden_act": "gelu_pytorch_tanh"}
    shape = tower_shape({"vision_config": tower, "text_config": {"hidden_size": 2048}}, {})
    assert shape is not None
    assert shape.parameters == pytest.approx(405_412_864, rel=0.01)


def test_a_trained_tower_takes_gradients_moments_and_activations_and_a_frozen_one_its_weights(tmp_path: Path):
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(
        "algorithm: {name: sft}\nmodel: {path: m}\ndata: {train: {generator: arithmetic}, max_tokens: 64}\n"
        "run: {steps: 1}\n"
    )
    shape = shape_of(build("qwen3_vl", 3).config.to_dict())
    tower = shape.tower
    assert tower is not None
    (frozen,), (whole,) = (
        load_recipe(recipe_file, ["data.prompts_per_step=2", "trainer.tokens_per_micro_batch=64", *setting])
        for setting in ([], ["model.train=[language, projector, vision]"])
    )
    least, most = (trainer_bytes(one, with_trained_parts(shape, one.model.train)) for one in (frozen, whole))
    assert most["weights"] == least["weights"]
    assert most["gradients"] - least["gradients"] == 4 * tower.parameters
    assert most["optimizer"] - least["optimizer"] == 8 * tower.parameters
    kept = 64 * tower.patches_per_token * 3 * activations.kept_by_tower(tower, 4)
    assert least["activations"] < kept < most["activations"]


@NEEDS_TORCHVISION
@pytest.mark.parametrize("parts", [("language",), ("language", "projector", "vision"), ("vision",)])
def test_an_adapter_on_parts_of_a_model_has_the_parameters_that_are_counted(parts: tuple[Part, ...], tmp_path: Path):
    """Of its files, and where they are not here of its config."""
    directory = write_seeing_model(tmp_path)
    block = ModelBlock(path=str(directory), train=parts, adapter=AdapterBlock(rank=3))
    model = load_adapted(block, seed=0, device=torch.device("cpu"))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert block.adapter is not None
    for stored in (stored_shapes(directory), {}):
        shape = shape_of(model.config.to_dict(), stored)
        assert with_adapter(shape, block.adapter, parts).adapter == trained
