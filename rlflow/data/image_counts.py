"""How many pictures, videos and recordings the rows of a stage have, and how many tokens training sees for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rlflow.data.audios import kind_of
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.image_rows import NAMES


@dataclass(frozen=True, slots=True)
class ImageCounts:
    """The pictures, videos and recordings of some rows."""

    images: int = 0
    """All of them."""
    videos: int = 0
    audios: int = 0
    tokens: int = 0
    longest: int = 0
    """Tokens of the largest one."""

    def __str__(self) -> str:
        numbers = (self.images - self.videos - self.audios, self.videos, self.audios)
        kinds = zip(NAMES.values(), numbers, strict=True)
        named = [f"{number:,} {kind}{'s' if number > 1 else ''}" for kind, number in kinds if number]
        return f"{' and '.join(named)}, {self.tokens:,} tokens in all and at most {self.longest:,} each"


def count_images(images: Iterable[bytes], vision: ImageProcessor | None) -> ImageCounts:
    """Counts encoded pictures; none of a model that takes text alone."""
    found = [] if vision is None else [(vision.num_tokens(image), kind_of(image)) for image in images]
    tokens, kinds = [number for number, _ in found], [kind for _, kind in found]
    videos, audios = (kinds.count(kind) for kind in ("video", "audio"))
    return ImageCounts(len(found), videos, audios, sum(tokens), max(tokens, default=0))
