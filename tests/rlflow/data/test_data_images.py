"""Pictures of rows: every form that is taken, and every one that is not."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from rlflow.data.errors import RowError
from rlflow.data.images import data_uri, decode, load_image, size_of
from tests.vision_models import picture

PNG = picture(12, 8)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode(data))


def test_every_form_of_a_picture_is_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.png").write_bytes(PNG)
    monkeypatch.chdir(tmp_path)
    text = base64.b64encode(PNG).decode()
    forms = [
        "a.png",
        "data/a.png",
        str(tmp_path / "data/a.png"),
        f"file://{tmp_path}/data/a.png",
        text,
        f"data:image/png;base64,{text}",
        PNG,
        {"bytes": PNG, "path": None},
        {"bytes": None, "path": "a.png"},
        {"url": f"data:image/png;base64,{text}"},
    ]
    assert [load_image(form, Path("data")) for form in forms] == [PNG] * len(forms)
    assert pixels(load_image(Image.open(io.BytesIO(PNG)), Path("data"))).tolist() == pixels(PNG).tolist()
    assert load_image(data_uri(PNG), Path()) == PNG


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("b.png", r"there is no file .*b\.png\. Nearest: a\.png"),
        ("https://example.org/a.png", "is an address, and a run fetches nothing: download it"),
        (b"", "an empty file"),
        (b"not a picture", "no picture in a format that Pillow knows"),
        (PNG[: len(PNG) // 2], "it is damaged: "),
        ("data:image/png;base64,!!!!", "is not base64"),
        ({"width": 3}, r"neither `bytes` nor `path` \(it has width\)"),
        (3, "a number, not a path"),
        (encoded(Image.fromarray(np.zeros((4, 4), dtype=np.uint16))), "not of 8 bits a channel"),
    ],
)
def test_what_is_no_sound_picture_is_refused_with_its_reason(tmp_path: Path, value: object, reason: str):
    (tmp_path / "a.png").write_bytes(PNG)
    with pytest.raises(RowError, match=reason):
        load_image(value, tmp_path)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_a_picture_of_several_frames_is_refused_with_their_number(format: str):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    with pytest.raises(RowError, match="3 frames"):
        load_image(data, Path())


def test_more_pixels_than_any_picture_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch):
    data = encoded(Image.new("1", (20_000, 20_000)))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(RowError, match="made to fill the memory"):
        load_image(data, Path())


@pytest.mark.parametrize(("width", "height"), [(400, 100), (1, 5000), (33, 31)])
def test_a_large_picture_keeps_its_shape_within_max_pixels(width: int, height: int):
    for format in ("PNG", "JPEG"):
        data = load_image(picture(width, height, format=format), Path(), max_pixels=1000)
        new_width, new_height = size_of(data)
        assert new_width * new_height <= 1000
        assert Image.open(io.BytesIO(data)).format == format
        if min(new_width, new_height) > 1:
            assert abs(new_width / new_height - width / height) < 0.1 * width / height
    small = picture(10, 100)
    assert load_image(small, Path(), max_pixels=1000) == small


def test_a_picture_is_turned_as_its_exif_data_says():
    image = Image.open(io.BytesIO(picture(16, 8)))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = load_image(encoded(image, "PNG", exif=exif), Path())
    exif_of = Image.open(io.BytesIO(turned)).getexif()
    assert size_of(turned) == (8, 16) and exif_of.get(0x0112) in (None, 1)
    assert pixels(turned).tolist() == np.rot90(np.asarray(image), -1).tolist()
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(turned))).size == (8, 16)


def test_a_picture_whose_metadata_pillow_cannot_read_stands_as_it_is(monkeypatch: pytest.MonkeyPatch):
    def fail(image: Image.Image) -> None:
        raise UnicodeDecodeError("utf-8", b"\xa8", 0, 1, "as Pillow 11 does for XMP that is no text")

    monkeypatch.setattr(Image.Image, "getexif", fail)
    assert load_image(PNG, Path()) == PNG


def test_what_shines_through_is_white_and_grey_and_palettes_keep_their_colors():
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    clear.putpixel((1, 0), (10, 20, 30, 0))
    assert pixels(load_image(encoded(clear), Path())).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    palette = Image.new("RGB", (2, 1), (200, 0, 0)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert pixels(load_image(encoded(palette), Path())).tolist() == [[[200, 0, 0]] * 2]
    assert pixels(load_image(encoded(Image.new("L", (1, 1), 7)), Path())).tolist() == [[[7, 7, 7]]]
    assert pixels(load_image(encoded(Image.new("CMYK", (1, 1)), "JPEG"), Path())).tolist() == [[[255, 255, 255]]]
