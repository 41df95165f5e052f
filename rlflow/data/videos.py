"""A row's videos to frames, once where the data is read.

What travels among a row's pictures is an archive of the frames (video_archive), each a picture as ``load_image`` makes
it. Files are decoded by whichever decoder is installed, at the frames that the model's own
video processor samples.
"""

from __future__ import annotations

import importlib.util
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlflow.data.errors import RowError
from rlflow.data.images import LONGEST_PATH, data_uri, encoded_bytes, find_file, load_image, missing, size_of
from rlflow.data.messages import KEYS
from rlflow.data.video_archive import Video, is_video, pack, unpack
from rlflow.torchvision_operators import install

_KEYS = (*KEYS["video"], "data")
"""Where a mapping may hold its video."""
_DECODERS = {"av": "pyav", "decord": "decord", "cv2": "opencv", "torchcodec": "torchcodec"}
"""Package -> transformers' name of it."""
FRAMES_PER_SECOND = 2.0
"""Of frames whose row says nothing else, and of a file where neither its row nor the processor does: qwen-vl-utils'."""


Sampler = Callable[[Any, float | None, int | None], Sequence[int]]
"""transformers' VideoMetadata, and frames a second or a number of frames where the row says them -> indices."""


def media_columns(media: Sequence[bytes]) -> dict[str, Any]:
    """The columns ``images`` and ``videos`` of a row, as text that ``load_image`` and ``load_video`` read."""
    pictures = [data_uri(data) for data in media if not is_video(data)]
    videos = [_as_text(unpack(data)) for data in media if is_video(data)]
    return ({"images": pictures} if pictures else {}) | ({"videos": videos} if videos else {})


def load_video(value: Any, directory: Path, max_pixels: int | None, sample: Sampler) -> bytes:
    """One video as an archive of its frames.

    Args:
        value: A list of frames, each as ``load_image`` takes pictures; a path, a data URI or the bytes of a file; what
            this function returned; or a mapping that holds one of them, with ``fps`` or ``nframes``.
        directory: What relative paths are relative to.
        max_pixels: Of a frame.
        sample: Chooses the frames of a file.

    Raises:
        RowError: There is no such file, nothing decodes it, or its frames are no pictures of one size.
    """
    options: dict[str, Any] = {}
    while isinstance(value, Mapping):
        held = [value[key] for key in _KEYS if value.get(key) is not None]
        if not held:
            raise RowError(f"it has none of {', '.join(_KEYS)} (it has {', '.join(map(str, value)) or 'nothing'})")
        options |= value
        value = held[0]
    if isinstance(value, bytes) and is_video(value):
        return value
    fps = _positive(options, "sample_fps", "fps")
    if isinstance(value, list | tuple):
        return pack(_of_frames(value, directory, max_pixels, fps or FRAMES_PER_SECOND, options))
    given = _positive(options, "nframes", "num_frames")
    number = None if given is None else max(1, int(given))
    with _as_file(value, directory) as path:
        return pack(_of_file(path, max_pixels, lambda metadata: sample(metadata, fps, number)))


def _of_frames(
    values: Sequence[Any], directory: Path, max_pixels: int | None, fps: float, options: Mapping[str, Any]
) -> Video:
    frames = []
    for index, value in enumerate(values):
        try:
            frames.append(load_image(value, directory, max_pixels))
        except RowError as error:
            raise RowError(f"frame {index}: {error}") from error
    if not frames:
        raise RowError("it has no frames")
    sizes = [size_of(frame) for frame in frames]
    if len(set(sizes)) > 1:
        other = next(index for index, size in enumerate(sizes) if size != sizes[0])
        width, height = sizes[other]
        raise RowError(f"frame {other} is {width} x {height} pixels, and frame 0 {sizes[0][0]} x {sizes[0][1]}")
    indices = options.get("frames_indices") or list(range(len(frames)))
    if not isinstance(indices, list | tuple) or not all(isinstance(index, int) and index >= 0 for index in indices):
        raise RowError(f"its frames_indices are {str(indices)[:80]}, not a list of whole numbers")
    if len(indices) != len(frames):
        raise RowError(f"it has {len(frames)} frames and {len(indices)} frames_indices")
    whole = _positive(options, "total_num_frames") or max(indices) + 1
    return Video(tuple(frames), tuple(indices), fps, int(whole))


def _of_file(path: Path, max_pixels: int | None, sample: Callable[[Any], Sequence[int]]) -> Video:
    decoder = next((name for package, name in _DECODERS.items() if importlib.util.find_spec(package)), None)
    if decoder is None:
        raise RowError(
            f"{path.name} is a video file, and no decoder is installed: pip install av, or give its frames as a list"
        )
    install()
    from PIL import Image
    from transformers.video_utils import load_video as decode_video

    def chosen(metadata: Any, **_: Any) -> list[int]:
        # Decoders say so of what they cannot read.
        if not (metadata.total_num_frames or 0) > 0 or not (metadata.fps or 0) > 0:
            raise RowError(f"{path.name} says nothing of its frames: it is damaged, or no video")
        return [int(index) for index in sample(metadata)]

    try:
        source: Any = str(path)
        pixels, metadata = decode_video(source, backend=decoder, sample_indices_fn=chosen)
    except RowError:
        raise
    # Whatever a damaged file makes a decoder raise, it is about that file.
    except Exception as error:
        raise RowError(f"{path.name} cannot be decoded by {decoder}: {error}") from error
    if decoder == "torchcodec":
        pixels = pixels.permute(0, 2, 3, 1).numpy()
    if len(pixels) != len(metadata.frames_indices):
        wanted = len(metadata.frames_indices)
        raise RowError(f"{path.name} is cut off: {len(pixels)} of the {wanted} frames that were chosen can be decoded")
    frames = tuple(load_image(_as_jpeg(Image.fromarray(frame)), path.parent, max_pixels) for frame in pixels)
    return Video(frames, tuple(metadata.frames_indices), float(metadata.fps), int(metadata.total_num_frames))


def _as_jpeg(frame: Any) -> bytes:
    """As PNG a minute of a film would be hundreds of megabytes."""
    buffer = io.BytesIO()
    frame.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


@contextmanager
def _as_file(value: Any, directory: Path) -> Iterator[Path]:
    """The file of a path, or a temporary one of what holds the video itself: decoders take files."""
    is_path = isinstance(value, str) and len(value) <= LONGEST_PATH and value[:5].lower() != "data:"
    if found := find_file(value, directory) if is_path else None:
        yield found
        return
    if is_path:
        raise missing(value, directory)
    with tempfile.NamedTemporaryFile() as file:
        file.write(encoded_bytes(value, directory))
        file.flush()
        yield Path(file.name)


def _positive(options: Mapping[str, Any], *names: str) -> float | None:
    """The first of these that is given."""
    for name in names:
        if options.get(name) is not None:
            value = options[name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise RowError(f"its {name} is {value!r}, not a number above 0")
            return float(value)
    return None


def _as_text(video: Video) -> dict[str, Any]:
    return {
        "frames": [data_uri(frame) for frame in video.frames],
        "fps": video.fps,
        "frames_indices": list(video.indices),
        "total_num_frames": video.num_frames,
    }
