"""Recordings of rows: what they become, and which are refused."""

from __future__ import annotations

import base64
import io
import json
import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlflow.data.audios import decode_audio, load_audio, seconds_of, write_wav
from rlflow.data.chat import Chat
from rlflow.data.errors import RowError
from rlflow.data.formats import Record, to_record
from rlflow.data.image_counts import count_images
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.sources import Row
from rlflow.data.tokenizer import load_tokenizer
from rlflow.recipe import ModelBlock
from tests.hearing_models import RATE, recording, write_hearing_processor

HERE = Path()


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> ImageProcessor:
    directory = tmp_path_factory.mktemp("hearing")
    write_hearing_processor(directory, "qwen2_audio")
    return ImageProcessor(str(directory))


def read(vision: ImageProcessor | None, row: dict[str, Any], directory: Path = HERE) -> Record:
    return to_record(Row(1, row), "prompt" if "prompt" in row else "messages", vision, directory)


def test_a_file_of_one_channel_and_16_bits_at_the_models_rate_stays_what_it_is(tmp_path: Path):
    given = recording(0.2)
    (tmp_path / "a.wav").write_bytes(given)
    as_text = base64.b64encode(given).decode()
    for value in ("a.wav", given, {"bytes": given, "path": None}, {"data": as_text, "format": "wav"}):
        assert load_audio(value, tmp_path, RATE) == given
    assert load_audio(f"data:audio/wav;base64,{as_text}", tmp_path, RATE) == given


def test_samples_of_every_width_are_the_parts_of_full_scale_that_they_stand_for():
    """By hand: the bytes of -1, 1/2 and 1/4 of full scale, the second channel silent."""
    for width, wholes in {1: [0, 192, 160], 2: [-(2**15), 2**14, 2**13], 3: [-(2**23), 2**22, 2**21]}.items():
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setparams((2, width, RATE, 0, "NONE", ""))
            silence = 128 if width == 1 else 0
            for whole in wholes:
                for sample in (whole, silence):
                    file.writeframes(sample.to_bytes(width, "little", signed=width > 1))
        assert decode_audio(load_audio(buffer.getvalue(), HERE, RATE)).tolist() == [-0.5, 0.25, 0.125]
    samples = np.array([0.0, -1.0, 0.3, 2.0])
    written = load_audio({"array": samples.tolist(), "sampling_rate": RATE}, HERE, RATE)
    assert decode_audio(written).tolist() == pytest.approx([0, -1, 0.3, 1], abs=1e-7)
    assert seconds_of(written) == 4 / RATE


def test_headers_as_ffmpeg_writes_them_are_read():
    """24 bits in the extensible form; to a pipe, without the length."""
    plain = recording(0.1, width=3)
    tail = struct.pack("<HHI14s", 22, 24, 4, bytes.fromhex("0100000000001000800000aa0038"))
    riff = struct.pack("<4sI", b"RIFF", len(plain) - 8 + 24)
    chunk = struct.pack("<IH", 40, 0xFFFE) + plain[22:36] + tail + b"\x9b\x71"
    extensible = riff + plain[8:16] + chunk + plain[36:]
    short = recording(0.1)
    piped = b"".join([short[:4], b"\xff" * 4, short[8:40], b"\xff" * 4, short[44:]])
    for given, meant in ((extensible, plain), (piped, short)):
        assert np.array_equal(decode_audio(load_audio(given, HERE, RATE)), decode_audio(meant))


def test_other_rates_are_resampled_where_scipy_is_there():
    """A tone of 440 Hz, whole and away from the ends of the recording, is itself at every rate."""
    pytest.importorskip("scipy")
    times = {rate: np.arange(rate // 2) / rate for rate in (44_100, RATE)}
    tones = {rate: 0.5 * np.sin(2 * np.pi * 440 * at) for rate, at in times.items()}
    found = decode_audio(load_audio(write_wav(tones[44_100], 44_100), HERE, RATE))
    assert len(found) == len(tones[RATE])
    assert np.abs(found - tones[RATE])[500:-500].max() < 2e-3


@pytest.mark.parametrize("place", ["in front", "tags", "parts", "openai"])
def test_every_form_of_a_row_places_its_recordings(vision: ImageProcessor, tmp_path: Path, place: str):
    first, second = (recording(seconds, seed=1) for seconds in (0.2, 0.3))
    (tmp_path / "a.wav").write_bytes(first)
    (tmp_path / "b.wav").write_bytes(second)
    data = base64.b64encode(second).decode()
    question = {"type": "text", "text": "Which?"}
    row: dict[str, Any] = {
        "in front": {"prompt": "Which?", "audio": ["a.wav", "b.wav"]},
        "tags": {"messages": [{"role": "user", "content": "<audio><audio>Which?"}], "audios": ["a.wav", "b.wav"]},
        "parts": {
            "messages": [
                {"role": "user", "content": [{"type": "audio"}, {"type": "audio", "audio": "b.wav"}, question]}
            ],
            "audios": "a.wav",
        },
        "openai": {
            "prompt": [
                {
                    "role": "user",
                    "content": [
                        {"type": "audio_url", "audio_url": {"url": "a.wav"}},
                        {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
                        question,
                    ],
                }
            ]
        },
    }[place]
    record = read(vision, row, tmp_path)
    assert record.images == (first, second)
    assert record.messages == [{"role": "user", "content": "<audio><audio>Which?", "images": 2, "audios": 2}]
    chat = Chat(load_tokenizer(ModelBlock(path=vision._path)), vision=vision)
    text = chat.render_prompt(record.messages).text
    assert text.count("<|audio_bos|><|AUDIO|><|audio_eos|>") == 2 and "<audio>" not in text
    # (samples / 160 spectra, halved twice).
    assert [vision.num_tokens(image) for image in record.images] == [5, 7]
    assert str(count_images(record.images, vision)) == "2 recordings, 12 tokens in all and at most 7 each"


def test_without_a_recording_a_tag_is_what_somebody_wrote(vision: ImageProcessor):
    message = {"role": "user", "content": "<image> is a tag"}
    assert read(vision, {"messages": [message]}).messages == [message]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("missing.wav", "there is no file .*missing.wav"),
        (b"", "it is an empty file"),
        (b"no sound", "its 8 bytes are no WAV file"),
        (b"RIFF\x08\x00\x00\x00WAVEfmt ", "its WAV header cannot be read"),
        (recording(0.2)[:-100], "it is cut off: 3,150 of its 3,200 samples are there"),
        (recording(0.2)[:20] + b"\x03" + recording(0.2)[21:-100], "it is cut off: 6,344 of its 6,444 bytes are there"),
        (recording(0), "it has no samples"),
        (recording(0.01), "it is 0.010 seconds long, too short"),
        (recording(2.5), "it is 2.5 seconds long, and the Qwen2AudioProcessor leaves out its end: cut it"),
        (recording(0.1, rate=1)[:24] + b"\x00" * 20, "its header says 0 samples a second|cannot be read"),
        (
            {"array": [0.0] * 9, "sampling_rate": "16k"},
            "it has `array`, and its `sampling_rate` is '16k', not a whole number",
        ),
        ({"array": [[0.0], [1.0]], "sampling_rate": RATE}, "its `array` has 2 dimensions"),
        ({"array": [0.0, float("nan")], "sampling_rate": RATE}, "some of its samples are no numbers"),
        ({"array": range(3602), "sampling_rate": 1}, "it is 1.0 hours long, and at most one is decoded"),
        ("https://a.b/c.wav", "https://a.b/c.wav is an address, and a run fetches nothing"),
    ],
)
def test_a_bad_recording_is_named_with_its_field(vision: ImageProcessor, value: Any, reason: str):
    with pytest.raises(RowError, match=rf"`audios\[0\]`: {reason}"):
        read(vision, {"prompt": "<audio>What?", "audios": [value]})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": "<audio><audio>Hi", "audios": [recording(0.2)]},
            "its text has 2 <audio>s, and its column 1 record",
        ),
        ({"prompt": "Hi", "images": ["a.png"]}, r"`images\[0\]` is a picture, and the model takes none"),
        ({"prompt": "Hi", "audio": ["a"], "audios": ["b"]}, "both `audios` and `audio` hold recordings"),
    ],
)
def test_rows_whose_recordings_have_no_place_are_refused(vision: ImageProcessor, row: dict[str, Any], reason: str):
    with pytest.raises(RowError, match=reason):
        read(vision, row)


def test_a_model_that_sees_refuses_recordings(tmp_path: Path):
    config = {"vision_config": {}, "audio_config": {}, "image_token_id": 5, "audio_token_id": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RowError, match="`audio` is a recording, and the model takes none: train a model that hears"):
        read(ImageProcessor(str(tmp_path)), {"prompt": "Hi", "audio": "a.wav"})
