"""Handwritten digits as rows: scikit-learn's pictures, each in one split, as PNG that decodes to its pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlflow.data.digits import digits
from rlflow.data.errors import DataError
from rlflow.data.images import decode, load_image


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"split": "test"}, "it is train or heldout"),
        ({"rows": 0}, "it is 1 at least"),
        ({"prompt": "Which?"}, "it needs <image> once"),
    ],
)
def test_an_argument_out_of_its_range_is_named(args: dict[str, object], reason: str):
    with pytest.raises(DataError, match=reason):
        next(digits(**args))  # type: ignore[arg-type]


def test_every_picture_is_in_one_split_with_its_digit_and_its_pixels():
    sklearn = pytest.importorskip("sklearn.datasets")
    pictures, numbers = sklearn.load_digits(return_X_y=True)
    wanted = {
        (picture * 15).astype(np.uint8).tobytes(): str(number)
        for picture, number in zip(pictures, numbers, strict=True)
    }
    rows = {split: list(digits(split)) for split in ("train", "heldout")}
    assert {split: len(of_split) for split, of_split in rows.items()} == {"train": 1437, "heldout": 360}
    seen = []
    for row in [*rows["train"], *rows["heldout"]]:
        shades = np.asarray(decode(load_image(row["images"][0], Path())))[:, :, 0]
        seen.append(shades.tobytes())
        assert wanted[seen[-1]] == row["response"] == row["solution"]
    assert len(set(seen)) == len(wanted) == 1797
    assert list(digits(rows=3)) == rows["train"][:3]
