"""A video as one value of bytes: an archive of its frames, each an encoded picture, and of their times.

It travels wherever a row's pictures do, in the order of their places in the text.
"""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any, NamedTuple

_ARCHIVE = b"PK\x03\x04"
_TIMES = "times.json"


class Video(NamedTuple):
    frames: tuple[bytes, ...]
    """Encoded pictures of one size."""
    indices: tuple[int, ...]
    """Of each frame, among all those of the file."""
    fps: float
    """Frames a second of the file."""
    num_frames: int
    """All those of the file."""

    def metadata(self) -> dict[str, Any]:
        """What transformers calls VideoMetadata; vLLM takes it as it is."""
        from PIL import Image

        width, height = Image.open(io.BytesIO(self.frames[0])).size
        return {
            "total_num_frames": self.num_frames,
            "fps": self.fps,
            "frames_indices": list(self.indices),
            "duration": self.num_frames / self.fps,
            "width": width,
            "height": height,
        }


def is_video(data: bytes) -> bool:
    """Whether encoded bytes are what ``load_video`` returns; ``load_image`` returns pictures."""
    return data.startswith(_ARCHIVE)


def frames_of(data: bytes) -> tuple[bytes, ...]:
    """The frames of a video, or the picture that something else is, encoded."""
    return unpack(data).frames if is_video(data) else (data,)


def unpack(data: bytes) -> Video:
    """What ``load_video`` returned."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        times = json.loads(archive.read(_TIMES))
        frames = tuple(archive.read(name) for name in sorted(archive.namelist()) if name != _TIMES)
    return Video(frames, tuple(times["frames_indices"]), times["fps"], times["total_num_frames"])


def pack(video: Video) -> bytes:
    """Equal videos are equal bytes."""
    buffer = io.BytesIO()
    times = {"fps": video.fps, "frames_indices": list(video.indices), "total_num_frames": video.num_frames}
    files = {f"{index:06}": frame for index, frame in enumerate(video.frames)}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in ({_TIMES: json.dumps(times).encode()} | files).items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()
