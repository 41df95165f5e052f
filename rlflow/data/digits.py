"""scikit-learn's handwritten digits: 1,797 pictures of 8 x 8 pixels by 43 people, which come with the package."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, Literal

from rlflow.data.errors import DataError
from rlflow.data.sampler import permutation

HELD_OUT = 360
"""Pictures of the split ``heldout``."""


def digits(
    split: Literal["train", "heldout"] = "train", rows: int | None = None, prompt: str = "<image>"
) -> Iterator[dict[str, Any]]:
    """Every picture of a split with its digit, as {prompt, images, response, solution}.

    Args:
        split: 1,437 pictures, or the other 360; drawn once for all.
        rows: the first so many; all when absent.
        prompt: what is asked, with ``<image>`` where the picture stands.

    Raises:
        DataError: scikit-learn is not installed, or an argument is out of its range.
    """
    check_digits(split, rows, prompt)
    try:
        from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(
            f"digits are scikit-learn's, which is not installed ({error}): pip install scikit-learn"
        ) from error
    from PIL import Image

    pictures, numbers = load_digits(return_X_y=True)
    drawn = permutation(len(numbers), 0, "digits")
    chosen = sorted(drawn[:HELD_OUT] if split == "heldout" else drawn[HELD_OUT:])
    for index in chosen[:rows]:
        buffer = io.BytesIO()
        # 16 shades.
        Image.fromarray((pictures[index].reshape(8, 8) * 15).astype("uint8")).save(buffer, "PNG")
        answer = str(numbers[index])
        yield {"prompt": prompt, "images": [{"bytes": buffer.getvalue()}], "response": answer, "solution": answer}


def check_digits(split: str, rows: int | None, prompt: str) -> None:
    """
    Raises:
        DataError: An argument is out of its range.
    """
    if split not in ("train", "heldout"):
        raise DataError(f"digits: split is {split!r}; it is train or heldout.")
    if rows is not None and rows < 1:
        raise DataError(f"digits: rows is {rows}; it is 1 at least.")
    if prompt.count("<image>") != 1:
        raise DataError(f"digits: prompt is {prompt!r}; it needs <image> once, where the picture stands.")
