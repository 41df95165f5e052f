"""A row's recordings to WAV files as a model's feature extractor takes them, once where the data is read.

What travels among a row's pictures is a WAV file of one channel at the extractor's rate: a file that is so already,
with 16 bits a sample, stays byte for byte what it is, and every other one is written with 32. WAV files of whole
numbers are read by Python itself; all others (FLAC, MP3, Ogg, WAV of floats) need soundfile, and other rates scipy.
"""

from __future__ import annotations

import importlib.util
import io
import math
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlflow.data.errors import RowError
from rlflow.data.images import encoded_bytes
from rlflow.data.messages import Kind
from rlflow.data.video_archive import is_video

LONGEST_SECONDS = 3600
"""Longer ones are not decoded: an hour of numbers is a quarter of a gigabyte, and no extractor reads one whole."""
NO_WRITER = (
    "no rollout engine writes from recordings: train it by sft, dpo or kto on rows with answers, and ask it with "
    "transformers alone"
)
"""Why nothing here asks a model that hears."""
NO_CLASSIFIER = "transformers reads no head beside the files of such models: train it by sft, dpo or kto"
"""Why none becomes a reward model or a classifier."""
_ENDLESS = 0x7FFF0000
"""Bytes that a header says of what was written to a pipe, or more."""
_FULL_SCALE = 2.0**31
"""Of 32-bit samples."""


def is_audio(data: bytes) -> bool:
    """Whether encoded bytes are what ``load_audio`` returns."""
    return data[:4] == b"RIFF" and data[8:12] == b"WAVE"


def kind_of(data: bytes) -> Kind:
    """What ``load_image``, ``load_video`` or ``load_audio`` returned."""
    return "audio" if is_audio(data) else "video" if is_video(data) else "image"


def load_audio(value: Any, directory: Path, rate: int) -> bytes:
    """One recording as a WAV file of one channel; several become their mean, as transformers has it.

    Args:
        value: A path, a data URI, base64 text, bytes; a mapping with one of them, or with ``array`` and
            ``sampling_rate``, as the library datasets has sound.
        directory: What a relative path is relative to.
        rate: Samples a second that the model hears.

    Raises:
        RowError: There is no such file, it is no sound, is damaged, empty or long, or nothing here reads it.
    """
    if isinstance(value, Mapping) and value.get("array") is not None:
        samples, found = _of_numbers(value)
    else:
        data = encoded_bytes(value, directory)
        if not data:
            raise RowError("it is an empty file")
        samples, found, is_as_wanted = _read(data)
        if is_as_wanted and found == rate and len(samples):
            return data
    if not len(samples):
        raise RowError("it has no samples")
    if not np.isfinite(samples).all():
        raise RowError("some of its samples are no numbers")
    mono = samples if samples.ndim == 1 else samples.mean(axis=1)
    return write_wav(_resampled(mono, found, rate), rate)


def decode_audio(data: bytes) -> np.ndarray:
    """What ``load_audio`` returned: float32 [samples], within -1 and 1."""
    return _read_wav(data)[0].reshape(-1).astype(np.float32)


def seconds_of(data: bytes) -> float:
    """How long what ``load_audio`` returned is."""
    with wave.open(io.BytesIO(data)) as file:
        return file.getnframes() / file.getframerate()


def write_wav(samples: np.ndarray, rate: int) -> bytes:
    """Samples within -1 and 1, [N], as a WAV file of one channel and 32 bits."""
    # The largest number of 32 bits is one less than full scale; what is louder is cut off there.
    whole = np.clip(np.rint(samples.astype(np.float64) * _FULL_SCALE), -_FULL_SCALE, _FULL_SCALE - 1).astype("<i4")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(4)
        file.setframerate(rate)
        file.writeframes(whole.tobytes())
    return buffer.getvalue()


def _read(data: bytes) -> tuple[np.ndarray, int, bool]:
    """Samples float64 [N, channels], how many a second, and whether it is WAV of one channel and 16 bits."""
    if is_audio(data):
        try:
            return _read_wav(data)
        # Of formats other than whole numbers, and of damage, which soundfile may say more of.
        except (wave.Error, EOFError) as error:
            reason = f"its WAV header cannot be read ({error})"
            size = int.from_bytes(data[4:8], "little") + 8
            if len(data) < size < _ENDLESS:
                raise RowError(f"it is cut off: {len(data):,} of its {size:,} bytes are there") from error
    else:
        reason = f"its {len(data):,} bytes are no WAV file"
    if importlib.util.find_spec("soundfile") is None:
        raise RowError(f"{reason}, and other formats need soundfile: pip install soundfile, or save WAV of 16 bits")
    import soundfile  # pyright: ignore[reportMissingImports]

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _require_short(file.frames, file.samplerate)
            return file.read(dtype="float64", always_2d=True), file.samplerate, False
    except soundfile.SoundFileError as error:
        raise RowError(f"{reason}, and soundfile reads nothing in it: {error}") from error


def _read_wav(data: bytes) -> tuple[np.ndarray, int, bool]:
    """As ``_read``, of a WAV file of whole numbers.

    Raises:
        wave.Error, EOFError: It is none, or its header is damaged.
    """
    with wave.open(io.BytesIO(_plainly_named(data))) as file:
        channels, width, rate, frames = file.getparams()[:4]
        if rate < 1:
            raise RowError(f"its header says {rate} samples a second")
        # What was written to a pipe says the largest number there is; it goes on to the end of the file.
        is_streamed = frames * channels * width >= _ENDLESS
        most = len(data) // (channels * width)
        _require_short(most if is_streamed else frames, rate)
        content = file.readframes(min(frames, most))
    read = len(content) // (channels * width)
    if read < frames and not is_streamed:
        raise RowError(f"it is cut off: {read:,} of its {frames:,} samples are there")
    content = content[: read * channels * width]
    if width == 1:
        whole = np.frombuffer(content, np.uint8).astype(np.float64) - 128
    elif width == 3:
        padded = np.zeros((read * channels, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(content, np.uint8).reshape(-1, 3)
        whole = padded.view("<i4").reshape(-1) / 256.0
    else:
        whole = np.frombuffer(content, f"<i{width}").astype(np.float64)
    samples = (whole / 2.0 ** (8 * width - 1)).reshape(-1, channels)
    return samples, rate, channels == 1 and width in (2, 4) and not is_streamed


def _plainly_named(data: bytes) -> bytes:
    """The file with the plain tag of whole numbers, where its header has them in the extensible form, as ffmpeg writes
    24 bits; Python knows that from 3.12 on."""
    # The tag begins the chunk, and the subformat that it stands for is 24 bytes behind it.
    tag = data.find(b"fmt ", 12, 4096) + 8
    if tag < 8 or data[tag : tag + 2] != b"\xfe\xff" or data[tag + 24 : tag + 26] != b"\x01\x00":
        return data
    return data[:tag] + b"\x01\x00" + data[tag + 2 :]


def _of_numbers(value: Mapping[str, Any]) -> tuple[np.ndarray, int]:
    rate = value.get("sampling_rate")
    if not isinstance(rate, int) or rate < 1:
        raise RowError(f"it has `array`, and its `sampling_rate` is {rate!r}, not a whole number")
    try:
        samples = np.asarray(value["array"], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RowError(f"its `array` is no list of numbers: {error}") from error
    if samples.ndim != 1:
        raise RowError(f"its `array` has {samples.ndim} dimensions, not one")
    _require_short(len(samples), rate)
    return samples, rate


def _require_short(samples: int, rate: int) -> None:
    """
    Raises:
        RowError: So many samples are longer than any that is decoded.
    """
    if samples > LONGEST_SECONDS * rate:
        raise RowError(f"it is {samples / rate / 3600:.1f} hours long, and at most one is decoded: cut it")


def _resampled(samples: np.ndarray, found: int, rate: int) -> np.ndarray:
    """Samples [N] at another rate."""
    if found == rate:
        return samples
    if importlib.util.find_spec("scipy") is None:
        raise RowError(
            f"it has {found:,} samples a second, and the model hears {rate:,}: pip install scipy, or save it so"
        )
    from scipy.signal import resample_poly  # pyright: ignore[reportMissingImports]

    common = math.gcd(found, rate)
    return resample_poly(samples, rate // common, found // common)
