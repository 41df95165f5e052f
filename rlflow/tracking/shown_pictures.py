"""Pictures of prompts in pages: data URIs of small copies, as many as a page's budget takes."""

from __future__ import annotations

from itertools import chain, islice
from pathlib import Path
from typing import Any

from rlflow.data.images import data_uri, load_image
from rlflow.data.video_archive import frames_of
from rlflow.tracking.rollouts import RolloutRecord

MOST_PIXELS = 160_000
"""Of a picture in a page; a larger one is scaled down."""
MOST_CHARACTERS = 2 << 20
"""Of all pictures of a page of rollouts."""


class ShownPictures:
    """The pictures of one page of rollouts."""

    def __init__(self, budget: int = MOST_CHARACTERS) -> None:
        self._left = budget

    def of(self, record: RolloutRecord) -> dict[str, Any]:
        """``images`` of a prompt, with each frame of its videos as one, and how many find no room; ``messages``, each
        with the number of its own."""
        if not record.images:
            return {}
        shown: list[str] = []
        frames = [frames_of(image) for image in record.images]
        for image in chain.from_iterable(frames):
            uri = data_uri(load_image(image, Path(), MOST_PIXELS))
            if len(uri) > self._left:
                break
            self._left -= len(uri)
            shown.append(uri)
        numbers = iter(map(len, frames))
        messages = [m | {"images": sum(islice(numbers, m["images"]))} if "images" in m else m for m in record.messages]
        return {"images": shown, "images_left_out": sum(map(len, frames)) - len(shown), "messages": messages}
