"""A row's pictures to encoded bytes, checked once where the data is read, and back to pixels where they are looked at.

What travels is PNG, JPEG or WebP, upright, with eight bits a channel, without an alpha channel, and of at most
``max_pixels``: a file that is so already stays byte for byte what it is. Every process decodes with ``decode``.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlflow.data.errors import RowError, nearest_beside
from rlflow.data.sources import kind

if TYPE_CHECKING:
    from PIL.Image import Image

_DATA_URI = re.compile(r"data:(?:(?:image|video|audio)/[\w.+-]+)?(?:;[\w=.-]+)*;base64,", re.IGNORECASE)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
LONGEST_PATH = 4096
"""Longer text is a picture itself."""
_HELD = ("bytes", "path", "url", "image_url", "image", "audio_url", "input_audio", "audio", "base64", "data")
"""Where a mapping may hold its file."""
_KEPT_FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
"""What is passed on as it was found -> its media type."""
_ORIENTATION = 0x0112
"""EXIF's tag of how a picture is to be turned."""
_UPRIGHT = (None, 0, 1)
_QUALITY = 95
"""Of a JPEG that had to be written anew."""


def load_image(value: Any, directory: Path, max_pixels: int | None = None) -> bytes:
    """One picture as encoded bytes that every decoder reads alike.

    Args:
        value: A path, a data URI, base64 text, bytes, a mapping with ``bytes`` or ``path`` (as the library datasets has
            pictures), or a picture of PIL.
        directory: What a relative path is relative to; where no such file is there, to the working directory.
        max_pixels: Width times height; a larger picture is scaled down.

    Raises:
        RowError: There is no such file, it is no picture, it is damaged, animated, or larger than any picture.
    """
    from PIL import Image

    if isinstance(value, Image.Image):
        return _normalised(value, None, max_pixels)
    data = encoded_bytes(value, directory)
    image = _open(data)
    return _normalised(image, data, max_pixels)


def decode(data: bytes) -> Image:
    """The picture that ``load_image`` returned, as PIL's, in RGB."""
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the header alone."""
    from PIL import Image

    return Image.open(io.BytesIO(data)).size


def media_type(data: bytes) -> str:
    """Of what ``load_image`` returned, e.g. ``image/png``."""
    from PIL import Image

    return _KEPT_FORMATS[str(Image.open(io.BytesIO(data)).format)]


def data_uri(data: bytes) -> str:
    """What ``load_image`` returned, as an address that holds all of it."""
    return f"data:{media_type(data)};base64,{base64.b64encode(data).decode()}"


def encoded_bytes(value: Any, directory: Path) -> bytes:
    """The bytes of a file that a value names or holds.

    Raises:
        RowError: There is none.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, Mapping):
        given = [value[key] for key in _HELD if value.get(key) is not None]
        if not given:
            raise RowError(f"it has neither `bytes` nor `path` (it has {', '.join(map(str, value)) or 'nothing'})")
        return encoded_bytes(given[0], directory)
    if not isinstance(value, str):
        raise RowError(f"it is {kind(value)}, not a path, base64 text or bytes")
    if uri := _DATA_URI.match(value):
        return _from_base64(value[uri.end() :])
    if len(value) > LONGEST_PATH and not _ADDRESS.match(value):
        return _from_base64(value)
    return _read_file(value, directory)


def _read_file(name: str, directory: Path) -> bytes:
    found = find_file(name, directory)
    if found is None:
        # Small pictures are short enough in base64 to be a path.
        if len(name) % 4 == 0 and _BASE64.fullmatch(name) and "." not in name and len(name) > 64:
            return _from_base64(name)
        raise missing(name, directory)
    try:
        return found.read_bytes()
    except OSError as error:
        raise RowError(f"{found} cannot be read: {error}") from error


def find_file(name: str, directory: Path) -> Path | None:
    """The file of a path or a ``file://`` address, beside the data or else in the working directory.

    Raises:
        RowError: It is the address of something that would have to be fetched.
    """
    if _ADDRESS.match(name) and not name.startswith("file://"):
        raise RowError(f"{name[:80]} is an address, and a run fetches nothing: download it and name the file")
    path = Path(os.path.expanduser(name.removeprefix("file://")))
    return next((place for place in (directory / path, path) if place.is_file()), None)


def missing(name: str, directory: Path) -> RowError:
    """What to say of a path without a file."""
    path = Path(os.path.expanduser(name.removeprefix("file://")))
    return RowError(f"there is no file {directory / path}.{nearest_beside(directory / path)}")


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(f"{text[:40]!r}... is not base64: {error}") from error


def _open(data: bytes) -> Image:
    """The picture of a file, its header read."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise RowError("it is an empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise RowError(
            f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels, as a file has that is made to fill the memory: scale "
            "it down"
        ) from None
    except UnidentifiedImageError:
        raise RowError(f"its {len(data):,} bytes are no picture in a format that Pillow knows") from None
    except Exception as error:
        # Whatever a damaged file makes Pillow raise, it is about that file.
        raise RowError(f"its header is damaged: {error}") from error


def _normalised(image: Image, data: bytes | None, max_pixels: int | None) -> bytes:
    """``data``, or the picture written anew where that is not as it should be."""
    num_frames = getattr(image, "n_frames", 1)
    # A phone's MPO is a JPEG with previews behind it.
    if num_frames > 1 and image.format != "MPO":
        raise RowError(f"it is animated, or has pages: {num_frames} frames. Save the one that is meant as a PNG")
    if image.mode.startswith(("I", "F")):
        raise RowError(f"its pixels are {image.mode}, not of 8 bits a channel: save it as an 8-bit PNG")
    try:
        image.load()
    except Exception as error:
        # As in _open.
        raise RowError(f"it is damaged: {error}") from error
    if min(image.size) < 1:
        raise RowError(f"it is {image.width} x {image.height} pixels")
    turned = _upright(image)
    scaled = _scaled(turned, max_pixels)
    opaque = _opaque(scaled)
    if data is not None and opaque is image and image.format in _KEPT_FORMATS:
        return data
    buffer = io.BytesIO()
    if image.format in ("JPEG", "MPO"):
        opaque.save(buffer, "JPEG", quality=_QUALITY)
    else:
        opaque.save(buffer, "PNG")
    return buffer.getvalue()


def _upright(image: Image) -> Image:
    """The picture turned as its EXIF data says."""
    from PIL import ImageOps

    try:
        if image.getexif().get(_ORIENTATION) in _UPRIGHT:
            return image
        return ImageOps.exif_transpose(image)
    except Exception:
        # Whatever damaged EXIF data makes Pillow raise, the picture itself was decoded and stands as it is.
        return image


def _scaled(image: Image, max_pixels: int | None) -> Image:
    """The picture with its shape and at most so many pixels."""
    from PIL import Image

    if max_pixels is None or image.width * image.height <= max_pixels:
        return image
    factor = math.sqrt(max_pixels / (image.width * image.height))
    width = min(max(1, math.floor(image.width * factor)), max_pixels)
    height = min(max(1, math.floor(image.height * factor)), max_pixels // width)
    if image.mode not in ("L", "RGB"):
        image = _opaque(image)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _opaque(image: Image) -> Image:
    """The picture in grey or RGB; what shines through is white."""
    from PIL import Image

    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")
