"""What becomes of pictures and their placeholders, against transformers' own processors."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlflow.data.errors import DataError, RowError
from rlflow.data.image_processor import ImageProcessor
from tests.vision_models import picture, write_processor

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="the Qwen-VL processors need torchvision"
)
FAMILIES = [
    pytest.param("qwen3_vl", marks=needs_torchvision),
    pytest.param("qwen2_5_vl", marks=needs_torchvision),
    "idefics3",
]
PICTURES = [picture(60, 40, 1), picture(33, 90, 2, "JPEG")]


@pytest.fixture(scope="module", params=FAMILIES)
def vision(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ImageProcessor:
    directory = tmp_path_factory.mktemp(request.param)
    write_processor(directory, request.param)
    return ImageProcessor(str(directory))


def asked(vision: ImageProcessor, images: list[Any], **options: Any) -> Any:
    """A question with pictures before and behind it, and a second one, by the processor's own template."""
    first, second = ({"type": "image"} if image is None else {"type": "image", "image": image} for image in images)
    messages = [
        {"role": "user", "content": [first, {"type": "text", "text": "What is this?"}, second]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat"}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?\n\n"}]},
    ]
    return vision.processor.apply_chat_template(messages, add_generation_prompt=True, **options)


def test_ids_and_pixels_are_the_processors_own(vision: ImageProcessor):
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in PICTURES]
    own = asked(vision, images, tokenize=True, return_dict=True, return_tensors="np")
    text = asked(vision, [None, None], tokenize=False)
    ids = np.array(vision.processor.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    assert (ids == vision.image_token_id).sum() == 2

    expanded = vision.expand(ids, PICTURES)
    assert expanded.dtype == np.int32 and expanded.tolist() == own["input_ids"][0].tolist()
    pixels = vision.pixels(PICTURES)
    assert set(pixels) == set(own) - {"input_ids", "attention_mask", "mm_token_type_ids"}
    for name, values in pixels.items():
        assert np.array_equal(values[None] if vision.is_nested else values, own[name]), name
    if "mm_token_type_ids" in own:
        assert np.array_equal(vision.token_types(expanded), own["mm_token_type_ids"][0])


def test_sources_lead_back_to_the_tokens_that_were_given(vision: ImageProcessor):
    ids = np.array([vision.image_token_id, 95, 96, vision.image_token_id, 97], dtype=np.int32)
    sources, is_image = vision.sources(ids, PICTURES)
    first, second = (vision.num_tokens(data) for data in PICTURES)
    assert sources.tolist() == [0] * first + [1, 2] + [3] * second + [4]
    assert is_image.tolist() == [True] * first + [False] * 2 + [True] * second + [False]
    expanded = vision.expand(ids, PICTURES)
    assert expanded[~is_image].tolist() == [95, 96, 97]
    assert vision.expand(ids[1:3], []).tolist() == [95, 96] and vision.pixels([]) == {}


def test_pictures_and_places_of_other_numbers_are_refused(vision: ImageProcessor):
    ids = np.array([vision.image_token_id, 95], dtype=np.int32)
    with pytest.raises(RowError, match=r"1 place for a picture .* and it has 2 pictures"):
        vision.expand(ids, PICTURES)
    with pytest.raises(RowError, match=r"1 place for a picture .* and it has 0 pictures"):
        vision.expand(ids, [])


@needs_torchvision
def test_a_shape_that_the_processor_refuses_is_a_fault_of_the_row(tmp_path: Path):
    write_processor(tmp_path, "qwen3_vl")
    with pytest.raises(RowError, match="refuses 1 x 300 pixels"):
        ImageProcessor(str(tmp_path)).num_tokens(picture(1, 300))


def test_a_directory_without_a_processor_is_named_when_the_first_picture_comes(tmp_path: Path):
    vision = ImageProcessor(str(tmp_path))
    with pytest.raises(DataError, match=r"model\.path: the image processor of .* cannot be loaded"):
        vision.num_tokens(PICTURES[0])
