"""Models that start from random weights: what transformers loads of the directory that is written for them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from rlflow.data.errors import DataError
from rlflow.data.image_processor import ImageProcessor, load_image_processor
from rlflow.data.new_model import write_new_model
from rlflow.data.prompts import load_prompts
from rlflow.data.tokenizer import load_tokenizer
from rlflow.recipe import ModelBlock
from rlflow.recipe.data_blocks import DataBlock, SourceBlock
from tests.vision_models import QWEN_TEMPLATE, picture, write_processor

TOWER = {"patch_size": 4, "temporal_patch_size": 1, "spatial_merge_size": 2}


def new_model(kind: str = "qwen3_vl", tower: dict[str, Any] = TOWER, **fields: Any) -> ModelBlock:
    architecture = {"model_type": kind, "text_config": {"hidden_size": 32}, "vision_config": tower}
    return ModelBlock(characters="what? 0123456789", architecture=architecture, **fields)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="Qwen3-VL's processor needs torchvision")
def test_a_new_model_that_sees_has_its_processor_tokens_and_template(tmp_path: Path):
    model = new_model(max_pixels=400)
    write_new_model(model, tmp_path)
    made = model.model_copy(update={"path": str(tmp_path)})
    tokenizer, vision = load_tokenizer(made), load_image_processor(made)
    assert vision is not None and type(vision.processor).__name__ == "Qwen3VLProcessor"
    image = tmp_path / "a.png"
    image.write_bytes(picture(40, 40))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "<image>what?", "images": "a.png", "response": "7"}))
    source = SourceBlock(path=str(tmp_path / "rows.jsonl"))
    (prompt,) = load_prompts(source, DataBlock(train=source), tokenizer, 0, vision=vision)
    # 40 x 40 is scaled to 20 x 20 pixels, of which the processor makes 16 x 16: 4 patches a token.
    names = ["<|vision_start|>", *["<|image_pad|>"] * 4, "<|vision_end|>", *"what?"]
    assert tokenizer.convert_ids_to_tokens(prompt.token_ids.tolist()) == names
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["image_token_id"] == vision.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert config["text_config"] == {
        "hidden_size": 32,
        "vocab_size": len(tokenizer),
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    assert vision.pixels(prompt.images)["pixel_values"].shape == (16, 3 * 1 * 4 * 4)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (new_model("idefics3"), "has model_type qwen3_vl or"),
        (new_model(tower={"patch_size": 4}), "needs temporal_patch_"),
    ],
)
def test_a_tower_without_a_processor_is_refused(tmp_path: Path, model: ModelBlock, reason: str):
    with pytest.raises(DataError, match=reason):
        write_new_model(model, tmp_path)


def test_a_model_of_text_has_no_image_processor(tiny_model_dir: Path):
    assert load_image_processor(ModelBlock(path=str(tiny_model_dir))) is None


def test_the_template_of_the_processor_goes_before_the_tokenizers(tmp_path: Path):
    write_processor(tmp_path, "idefics3")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": QWEN_TEMPLATE}))
    assert load_tokenizer(ModelBlock(path=str(tmp_path))).chat_template != QWEN_TEMPLATE
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(ModelBlock(path=str(tmp_path)))
    assert tokenizer.chat_template == QWEN_TEMPLATE == ImageProcessor(str(tmp_path)).processor.chat_template
