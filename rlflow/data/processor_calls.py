"""A transformers processor called for one picture, video or recording, in a text that is its placeholder alone or has
one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlflow.data.errors import RowError
from rlflow.data.video_archive import Video

if TYPE_CHECKING:
    from PIL.Image import Image

Arrays = Mapping[str, np.ndarray]
"""What a processor returns, by name."""


def process_picture(processor: Any, image: Image, text: str | None = None) -> Arrays:
    """The arrays for a picture."""
    return processor(
        text=[processor.image_token if text is None else text],
        images=[image],
        add_special_tokens=False,
        return_tensors="np",
    )


def process_video(processor: Any, video: Video, pixels: np.ndarray) -> Arrays:
    """The arrays for a video, its pixels uint8 [frames, H, W, 3].

    Raises:
        RowError: The processor reads videos as something else.
    """
    made = processor(
        text=[processor.video_token],
        videos=[pixels],
        video_metadata=[video.metadata()],
        do_sample_frames=False,
        input_data_format="channels_last",
        add_special_tokens=False,
        return_tensors="np",
    )
    token_id = processor.tokenizer.convert_tokens_to_ids(processor.video_token)
    if "pixel_values_videos" not in made or not (made["input_ids"] == token_id).any():
        raise RowError(f"the {type(processor).__name__} reads videos as pictures: give frames as `images`")
    # As tensors they have 32 bits.
    return {n: v.astype(np.float32) if getattr(v, "dtype", None) == np.float64 else v for n, v in made.items()}


def process_audio(processor: Any, samples: np.ndarray, text: str | None = None) -> Arrays:
    """The arrays for a recording, float32 [N] at the rate of the processor's feature extractor.

    Raises:
        RowError: The processor refuses it.
    """
    try:
        # Some processors return tensors alone.
        made = processor(
            text=[processor.audio_token if text is None else text],
            audio=[samples],
            sampling_rate=processor.feature_extractor.sampling_rate,
            add_special_tokens=False,
            return_tensors="pt",
        )
    except (ValueError, TypeError) as error:
        raise RowError(f"the {type(processor).__name__} refuses {len(samples):,} samples: {error}") from error
    return {name: values.numpy() for name, values in made.items() if hasattr(values, "numpy")}


def blank(width: int, height: int) -> Image:
    """A picture of one colour."""
    from PIL import Image

    return Image.new("RGB", (width, height), (200, 100, 50))


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of several pictures and videos, or recordings, each name's end to end. What some extractors leave as long
    as its recording, [1, ..., frames], is filled up to the longest with zeros, which their masks leave out."""
    names = dict.fromkeys(name for arrays in parts for name in arrays)
    return {name: _end_to_end([arrays[name] for arrays in parts if name in arrays], name) for name in names}


def _end_to_end(arrays: Sequence[np.ndarray], name: str) -> np.ndarray:
    if "feature" in name:
        frames = max(values.shape[-1] for values in arrays)
        arrays = [np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, frames - values.shape[-1])]) for values in arrays]
    return np.concatenate(arrays)
