"""How many pictures and videos the rows of a stage have, and how many tokens training sees in their places."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rlflow.data.image_processor import ImageProcessor
from rlflow.data.video_archive import is_video


@dataclass(frozen=True, slots=True)
class ImageCounts:
    """The pictures and videos of some rows."""

    images: int = 0
    """All of them."""
    videos: int = 0
    tokens: int = 0
    longest: int = 0
    """Tokens of the largest one."""

    def __str__(self) -> str:
        kinds = {"picture": self.images - self.videos, "video": self.videos}
        named = [f"{number:,} {kind}{'s' if number > 1 else ''}" for kind, number in kinds.items() if number]
        return f"{' and '.join(named)}, {self.tokens:,} tokens in all and at most {self.longest:,} each"


def count_images(images: Iterable[bytes], vision: ImageProcessor | None) -> ImageCounts:
    """Counts encoded pictures; none of a model that takes text alone."""
    found = [] if vision is None else [(vision.num_tokens(image), is_video(image)) for image in images]
    tokens = [number for number, _ in found]
    return ImageCounts(len(found), sum(of_video for _, of_video in found), sum(tokens), max(tokens, default=0))
