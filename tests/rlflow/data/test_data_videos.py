"""Rows with videos, as frames and as files, against transformers' own processors."""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlflow.data.errors import RowError
from rlflow.data.formats import Record, to_record
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.image_rows import keep_places
from rlflow.data.images import decode
from rlflow.data.prompts import load_prompts
from rlflow.data.sources import Row
from rlflow.data.video_archive import is_video, unpack
from rlflow.data.videos import media_columns
from tests.seeing_models import NEEDS_TORCHVISION
from tests.vision_models import picture, write_processor

pytestmark = NEEDS_TORCHVISION
FRAMES = [picture(40, 24, seed) for seed in range(5)]
FIRST = picture(60, 40, 1)


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl"])
def vision(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ImageProcessor:
    directory = tmp_path_factory.mktemp(request.param)
    write_processor(directory, request.param)
    return ImageProcessor(str(directory))


@pytest.fixture
def names(tmp_path: Path) -> list[str]:
    for index, frame in enumerate(FRAMES):
        (tmp_path / f"{index}.png").write_bytes(frame)
    return [f"{index}.png" for index in range(len(FRAMES))]


def processed(vision: ImageProcessor, content: list[dict[str, Any]], **options: Any) -> dict[str, np.ndarray]:
    """What the processor's own template, tokenizer and processors make of a question."""
    message = {"role": "user", "content": content}
    made = vision.processor.apply_chat_template(
        [[message]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="np",
        processor_kwargs=options,
    )
    return dict(made)


def asked(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def read(vision: ImageProcessor | None, directory: Path = Path(), **columns: Any) -> Record:
    return to_record(Row(1, columns), "prompt", vision, directory)


def test_every_form_of_a_video_has_the_processors_ids_and_arrays(
    vision: ImageProcessor, make_data: Callable[..., Any], names: list[str]
):
    """Ids and times: a picture, a text whose last character could be of one token with the first time, a video."""
    text = "and (<"
    content = [
        {"type": "image", "image": decode(FIRST)},
        {"type": "text", "text": text},
        {"type": "video", "video": [decode(frame) for frame in FRAMES]},
    ]
    times = {"total_num_frames": 5, "fps": 1.5, "frames_indices": list(range(5))}
    wanted = processed(vision, content, video_metadata=[[times]], do_sample_frames=False)
    first, tags = base64.b64encode(FIRST).decode(), f"<image>{text}<video>"
    parts = [{"type": "image"}, {"type": "text", "text": text}]
    forms = [
        {"prompt": tags, "images": [first], "videos": [{"frames": names, "fps": 1.5}]},
        {"messages": asked(*parts, {"type": "video", "video": names, "fps": 1.5}), "image": first},
        {"messages": asked(*parts, {"type": "video"}), "image": first, "video": {"video": names, "sample_fps": 1.5}},
    ]
    for form in forms:
        data = make_data([form])
        (prompt,) = load_prompts(data.train, data, vision.processor.tokenizer, 0, vision=vision)
        assert prompt.token_ids.tolist() == wanted["input_ids"][0].tolist()
        assert [is_video(image) for image in prompt.images] == [False, True]
        made = vision.pixels(prompt.images)
        assert set(made) == {name for name in wanted if name.startswith(("pixel", "image", "video", "second"))}
        assert all(np.allclose(made[name], wanted[name], atol=1e-6) for name in made)
        assert (vision.token_types(prompt.token_ids) == wanted["mm_token_type_ids"][0]).all()


@pytest.mark.skipif(importlib.util.find_spec("cv2") is None, reason="something must write a video")
def test_of_a_file_those_frames_are_read_that_the_models_own_processor_samples(vision: ImageProcessor, tmp_path: Path):
    import cv2

    path = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 8.0, (48, 32))
    for shade in range(24):
        writer.write(np.full((32, 48, 3), 10 * shade, dtype=np.uint8))
    writer.release()
    reader = cv2.VideoCapture(str(path))
    every_frame = [cv2.cvtColor(reader.read()[1], cv2.COLOR_BGR2RGB) for _ in range(24)]
    for options in ({}, {"fps": 4.0}, {"nframes": 6}):
        sampled = {"num_frames": 6, "fps": None} if "nframes" in options else {"fps": 2.0} | options
        times = {"total_num_frames": 24, "fps": 8.0}
        content = [{"type": "video", "video": np.stack(every_frame)}]
        wanted = processed(vision, content, do_sample_frames=True, video_metadata=[[times]], **sampled)
        record = read(vision, tmp_path, prompt="<video>", videos=[{"path": "clip.mp4", **options}])
        made = vision.pixels(record.images)
        assert (made["video_grid_thw"] == wanted["video_grid_thw"]).all()
        # What is read is kept as JPEG.
        assert np.abs(made["pixel_values_videos"] - wanted["pixel_values_videos"]).max() < 0.1
        written = vision.processor.tokenizer.decode(vision._replacement(record.images[0]))
        assert written in vision.processor.tokenizer.decode(wanted["input_ids"][0])
    most = unpack(vision.load({"video": "clip.mp4", "nframes": 1000}, tmp_path, "video"))
    assert most.indices == tuple(range(24))
    scaled = ImageProcessor(vision._path, max_pixels=100)
    assert unpack(scaled.load("clip.mp4", tmp_path, "video")).metadata()["width"] == 12


def test_what_is_written_of_a_video_is_read_as_the_same_video(vision: ImageProcessor):
    """Rows that a next stage reads, and the rollouts of a run."""
    record = read(vision, prompt="a<video>b", images=[], videos=[{"frames": FRAMES, "fps": 3.0}])
    seen = (FIRST, record.images[0])
    again = read(vision, prompt="<image>a<video>b", **media_columns(seen))
    assert again.images == seen
    assert read(vision, prompt="<image>a<video>b", images=[seen[0]], videos=[seen[1]]).images == seen


def test_what_an_environment_begins_with_shows_videos_where_its_row_has_them(vision: ImageProcessor):
    record = read(vision, prompt="<video>or<image>", images=[FIRST], videos=[FRAMES])
    (message,), images = keep_places([{"role": "user", "content": "<video>?<image>"}], record.images)
    assert (message["images"], message["videos"], images) == (2, 1, record.images)
    with pytest.raises(RowError, match="in another order than its row"):
        keep_places([{"role": "user", "content": "<image>?<video>"}], record.images)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"prompt": "<video>"}, "its text has 1 <video>, and its column 0 videos"),
        ({"prompt": "<video>", "videos": [FRAMES, FRAMES]}, "its text has 1 <video>, and its column 2 videos"),
        ({"prompt": "<image>", "videos": [FRAMES]}, "its text has 1 <image>, and its column 0 pictures"),
        ({"prompt": "a", "videos": [[]]}, r"`videos\[0\]`: it has no frames"),
        ({"prompt": "a", "videos": [[*FRAMES, FIRST]]}, "frame 5 is 60 x 40 pixels, and frame 0 40 x 24"),
        ({"prompt": "a", "videos": [[FRAMES[0][:60]]]}, r"`videos\[0\]`: frame 0: it is damaged"),
        ({"prompt": "a", "videos": ["no.mp4"]}, r"`videos\[0\]`: there is no file no\.mp4"),
        ({"prompt": "a", "video": "https://x.org/a.mp4"}, "`video`: https://x.org/a.mp4 is an address"),
        ({"prompt": "a", "videos": [{"frames": FRAMES, "fps": 0}]}, "its fps is 0, not a number above 0"),
        ({"prompt": "a", "video": {"frames": FRAMES, "frames_indices": "01234"}}, "not a list of whole numbers"),
        ({"prompt": "a", "video": {"frames": FRAMES, "frames_indices": [0]}}, "it has 5 frames and 1 frames_indices"),
        ({"prompt": "a", "video": {"frames": FRAMES, "total_num_frames": "x"}}, "its total_num_frames is 'x', not a"),
        ({"prompt": "a", "videos": [FRAMES], "video": [FRAMES]}, "both `videos` and `video` hold videos"),
        ({"prompt": "a", "videos": [{"start": 1}]}, "it has none of video, video_url, frames"),
    ],
)
def test_videos_that_cannot_be_used_are_named(vision: ImageProcessor, columns: dict[str, Any], reason: str):
    with pytest.raises(RowError, match=reason):
        read(vision, **columns)


def test_a_file_that_is_no_video_and_one_that_nothing_decodes_are_named(
    vision: ImageProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for data in (b"not a video" * 99, FRAMES[0], b""):
        (tmp_path / "a.mp4").write_bytes(data)
        if importlib.util.find_spec("cv2") is not None:
            with pytest.raises(RowError, match=r"a\.mp4 (says nothing of its frames|cannot be decoded)"):
                read(vision, tmp_path, prompt="a", videos=["a.mp4"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RowError, match=r"a\.mp4 is a video file, and no decoder is installed: pip install av"):
        read(vision, tmp_path, prompt="a", videos=["a.mp4"])


def test_a_tag_is_text_to_a_model_that_takes_no_videos(tmp_path: Path):
    write_processor(tmp_path, "idefics3")
    idefics = ImageProcessor(str(tmp_path))
    record = read(idefics, prompt="<image> in a <video> tag", images=[FIRST])
    assert record.messages[0] == {"role": "user", "content": "<image> in a <video> tag", "images": 1}
    assert read(None, prompt="A <video> tag").messages[0]["content"] == "A <video> tag"
