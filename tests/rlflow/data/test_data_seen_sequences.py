"""Classified texts with pictures: what is cut, and what is refused with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlflow.data.image_processor import ImageProcessor
from rlflow.data.sequences import load_sequences
from rlflow.data.tokenizer import load_tokenizer
from rlflow.recipe import ModelBlock, algorithm_of
from tests.vision_models import picture, write_processor

TWO_CLASSES = algorithm_of("classification", classification={"labels": ["dark", "light"]})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "<image>", "images": []}, "its text has 1 <image>, and its column 0 pictures"),
        ({"text": "Hi", "images": ["gone.png"]}, "`images[0]`"),
        ({"text": "Hi", "text_pair": "You", "images": ["0.png"]}, "`images` is not empty, and it is text alone"),
        ({"text": "Hi", "audios": ["a.wav"]}, "`audios` is not empty, and sound is not read"),
        ({"text": "Hi " * 200, "images": ["0.png"]}, None),
        ({"text": "Hi " * 200 + "<image>", "images": ["0.png"]}, "its pictures end behind 100 tokens"),
    ],
    ids=["no picture", "no file", "a pair", "sound", "cut behind its picture", "cut in its picture"],
)
def test_pictures_that_cannot_be_read_are_named(make_data, tmp_path: Path, row: dict[str, Any], reason: str | None):
    write_processor(tmp_path, "idefics3")
    (tmp_path / "0.png").write_bytes(picture(24, 24))
    rows = [{"text": "Hi", "label": 0}, {**row, "label": 1}]
    data = make_data(rows, {"max_bad_rows": 1}, max_tokens=100, overlong="truncate")
    tokenizer, vision = load_tokenizer(ModelBlock(path=str(tmp_path))), ImageProcessor(str(tmp_path))
    kept = load_sequences(data, tokenizer, 0, vision, algorithm=TWO_CLASSES)
    if reason is None:
        assert [len(row.token_ids[0]) for row in kept] == [3, 100]
        assert kept[1].token_ids[0][-1] == tokenizer.eos_token_id
    else:
        (skipped,) = kept.skipped
        assert skipped.row == 2 and reason in skipped.reason
