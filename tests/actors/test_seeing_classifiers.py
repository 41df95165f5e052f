"""Reward models that see: what is written of one, transformers alone loads, and gives the scores that were trained."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from rlflow.actors.model_files import save_model
from rlflow.actors.sequence_files import pad_model
from rlflow.actors.train_engines.scalar_model import load_scalar_model, read_classifier
from rlflow.batching import pack
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.processor_files import copy_processor_files
from rlflow.data.tokenizer import save_tokenizer
from rlflow.recipe import ModelBlock
from rlflow.tracking.card_snippets import usage
from rlflow.types import Sample
from tests.seeing_models import FAMILIES, write_seeing_model
from tests.vision_models import picture

SAID = (("A sign", (picture(40, 24, 1),)), ("Nothing", ()))


def score(model: Any, processor: Any, said: str, images: tuple[bytes, ...]) -> float:
    """By transformers."""
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": said}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    shown = [Image.open(io.BytesIO(image)) for image in images] or None
    inputs = processor(text=[text], images=shown, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits[0, 0].item()


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_alone_scores_conversations_with_pictures_as_training_does(family: str, tmp_path: Path):
    base, written = write_seeing_model(tmp_path, family), tmp_path / "written"
    block = ModelBlock(path=str(base))
    model: Any = read_classifier(block, seed=0)
    with torch.no_grad():
        model.score.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    tokenizer = pad_model(model, block)
    written.mkdir()
    save_model(model, written)
    save_tokenizer(tokenizer, written)
    copy_processor_files(block, written)
    module = load_scalar_model(ModelBlock(path=str(written)), seed=0, device=torch.device("cpu"))
    vision = ImageProcessor(str(written))
    samples = []
    for said, images in SAID:
        parts = [*({"type": "image"} for _ in images), {"type": "text", "text": said}]
        text = vision.processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
        ids = np.array(tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int32)
        ids = vision.expand(ids, images)
        mask = np.zeros(len(ids), dtype=bool)
        samples.append(Sample(ids, mask, mask.astype(np.float32), images=images))
    ((batch,),) = pack(samples, max_tokens=1000, num_ranks=1)
    with torch.no_grad():
        scores = module(batch, torch.device("cpu"), "scores").numpy()
    expected = [float(scores[list(batch.sample_indices).index(index)]) for index in range(2)]
    named = json.loads((written / "config.json").read_text())["auto_map"]["AutoModelForSequenceClassification"]
    # As AutoModelForSequenceClassification finds it, where no rlflow has registered its own.
    found: Any = get_class_from_dynamic_module(named, str(written)).from_pretrained(written)
    processor = AutoProcessor.from_pretrained(written)
    assert [score(found, processor, *one) for one in SAID] == pytest.approx(expected, abs=1e-4)
    assert abs(expected[0] - expected[1]) > 1e-2
    code = usage(written, {"algorithm": {"name": "reward_model"}, "rollout": {"max_new_tokens": 1}})
    assert "trust_remote_code=True" in code
