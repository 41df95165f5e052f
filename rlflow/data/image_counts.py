"""How many pictures the rows of a stage have, and how many tokens training sees in their places."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rlflow.data.image_processor import ImageProcessor


@dataclass(frozen=True, slots=True)
class ImageCounts:
    """The pictures of some rows."""

    images: int = 0
    tokens: int = 0
    longest: int = 0
    """Tokens of the largest one."""

    def __str__(self) -> str:
        pictures = "1 picture" if self.images == 1 else f"{self.images:,} pictures"
        return f"{pictures}, {self.tokens:,} tokens in all and at most {self.longest:,} each"


def count_images(images: Iterable[bytes], vision: ImageProcessor | None) -> ImageCounts:
    """Counts encoded pictures; none of a model that takes text alone."""
    tokens = [] if vision is None else [vision.num_tokens(image) for image in images]
    return ImageCounts(len(tokens), sum(tokens), max(tokens, default=0))
