"""What a vision-language model makes of pictures and videos: how many tokens each is, and what its tower reads.

It is the model's own transformers processor, called for one picture at a time, so that what becomes of a picture
depends on nothing beside it. What a chat template writes has one placeholder a picture; training sees what the
processor writes in its place, which the picture's size alone decides. Of a video it is also the number of its frames
and their times. Where nothing else is said, what is said of pictures holds of videos.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlflow.data.errors import DataError, RowError, counted
from rlflow.data.images import LONGEST_PATH, decode, load_image, size_of
from rlflow.data.video_archive import Video, is_video, unpack
from rlflow.data.videos import FRAMES_PER_SECOND, load_video
from rlflow.torchvision_operators import install

if TYPE_CHECKING:
    from PIL.Image import Image

    from rlflow.recipe import ModelBlock

_OF_THE_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "video_metadata"}
"""What a processor returns that is not of the pictures."""
_VIDEO_PIXELS = "pixel_values_videos"

_SIZES = 1000
"""Of pictures, at most, whose tokens are kept: a server sees ever new ones."""


class ImageProcessor:
    """The processor of one model. Nothing is loaded before the first picture."""

    def __init__(
        self,
        path: str,
        max_pixels: int | None = None,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """
        Args:
            path: Of the model.
            max_pixels: Width times height; ``load`` scales larger pictures down.
            revision: Of a hub id.
            trust_remote_code: Whether code that comes with the model may run.
        """
        self._path = path
        self.max_pixels = max_pixels
        self._loading: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self._written: dict[tuple[Any, ...], np.ndarray] = {}
        """Width and height, and of a video its times -> what is written in the place of such a picture, int32."""
        self._files: dict[tuple[Path, str, bool], bytes] = {}
        """Pictures of paths: several rows may show the same one."""

    @cached_property
    def processor(self) -> Any:
        """transformers' own.

        Raises:
            DataError: It cannot be loaded, or what it writes for a picture cannot be told from the text around it.
        """
        from transformers import AutoProcessor

        install()
        try:
            processor = AutoProcessor.from_pretrained(self._path, **self._loading)
        # Code of many authors, over files of many more: whatever it raises, this model has no processor here.
        except Exception as error:
            raise DataError(
                f"model.path: the image processor of {self._path} cannot be loaded: {error}. It needs "
                "preprocessor_config.json or processor_config.json beside the model, and the packages that it names."
            ) from error
        if not hasattr(processor, "image_processor") or getattr(processor, "image_token", None) is None:
            raise DataError(
                f"model.path: {self._path} has a {type(processor).__name__}, which has no placeholder of a picture. "
                "Models whose processor writes one are supported, such as Qwen3-VL, Qwen2.5-VL, Idefics3 and SmolVLM."
            )
        return processor

    @cached_property
    def image_token(self) -> str:
        """The placeholder, as text."""
        self._check()
        return str(self.processor.image_token)

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        """Of the model; empty where it has none. That of a directory is read without transformers, and so torch."""
        if Path(self._path).is_dir():
            file = Path(self._path) / "config.json"
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        from transformers import PreTrainedConfig

        try:
            config, _ = PreTrainedConfig.get_config_dict(self._path, **self._loading)
        except OSError:
            return {}
        return config

    @property
    def takes_images(self) -> bool:
        """Whether the model has a tower for pictures, by its config."""
        return "vision_config" in self._config

    @cached_property
    def image_token_id(self) -> int:
        """The placeholder; also what the tower's features take the places of. Text alone needs no processor."""
        for name in ("image_token_id", "image_token_index"):
            if isinstance(self._config.get(name), int):
                return self._config[name]
        return int(self.processor.tokenizer.convert_tokens_to_ids(self.image_token))

    @cached_property
    def video_token_id(self) -> int | None:
        """The placeholder of a video, and of its features; None of a model that takes none."""
        given = self._config.get("video_token_id")
        return given if isinstance(given, int) and given != self.image_token_id else None

    @property
    def takes_videos(self) -> bool:
        """Whether the model has a placeholder of videos, by its config."""
        return self.video_token_id is not None

    def is_placeholder(self, token_ids: np.ndarray) -> np.ndarray:
        """bool, in the shape of ``token_ids``: where a picture or a video stands, or a feature of one."""
        return self.token_types(token_ids) > 0

    @cached_property
    def is_nested(self) -> bool:
        """Whether the model wants the arrays of ``pixels`` with one more dimension in front."""
        return _process(self.processor, _probe_picture())["pixel_values"].ndim == 5

    def load(self, value: Any, directory: Path) -> bytes:
        """A row's picture, encoded: ``load_image`` with the model's ``max_pixels``.

        Raises:
            RowError: It cannot be used.
        """
        return self._kept(value, directory, is_video=False)

    def load_video(self, value: Any, directory: Path) -> bytes:
        """A row's video, as an archive of its frames: ``load_video`` of rlflow.data.videos with the model's
        ``max_pixels``, and the frames that its own video processor samples.

        Raises:
            RowError: It cannot be used.
        """
        return self._kept(value, directory, is_video=True)

    def _kept(self, value: Any, directory: Path, *, is_video: bool) -> bytes:
        def load() -> bytes:
            if is_video:
                return load_video(value, directory, self.max_pixels, self._sample)
            return load_image(value, directory, self.max_pixels)

        if not isinstance(value, str) or len(value) > LONGEST_PATH:
            return load()
        if (directory, value, is_video) not in self._files:
            self._files[directory, value, is_video] = load()
        return self._files[directory, value, is_video]

    def _sample(self, metadata: Any, fps: float | None, num_frames: int | None) -> list[int]:
        """Which frames of a file the processor takes: Sampler."""
        videos = self._videos
        own = {name: getattr(videos, name, None) for name in videos.valid_kwargs.__annotations__}
        if num_frames is not None:
            own |= {"num_frames": min(num_frames, metadata.total_num_frames), "fps": None}
        elif fps is not None or own.get("num_frames") is None:
            own |= {"num_frames": None, "fps": fps or own.get("fps") or FRAMES_PER_SECOND}
        return [int(index) for index in videos.sample_frames(metadata, **own)]

    @property
    def _videos(self) -> Any:
        """transformers' own of videos.

        Raises:
            RowError: There is none.
        """
        processor = self.processor
        if getattr(processor, "video_processor", None) is None or getattr(processor, "video_token", None) is None:
            raise RowError(f"the {type(processor).__name__} of {self._path} reads no videos: give frames as `images`")
        return processor.video_processor

    def num_tokens(self, image: bytes) -> int:
        """How many tokens training sees in the place of one placeholder."""
        return len(self._replacement(image))

    def expand(self, token_ids: np.ndarray, images: Sequence[bytes]) -> np.ndarray:
        """The ids as training sees them, int32 [T].

        Args:
            token_ids: int32, with one placeholder a picture.
            images: Encoded pictures, in the order of the placeholders.

        Raises:
            RowError: There are more or fewer pictures than placeholders, or the processor refuses one.
        """
        return self._expand(token_ids, images)[0]

    def sources(self, token_ids: np.ndarray, images: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Of each token of ``expand``: which of ``token_ids`` it comes from, int64 [T], and whether it stands for a
        part of a picture, bool [T].

        Raises:
            RowError: As ``expand``.
        """
        return self._expand(token_ids, images)[1:]

    def token_types(self, token_ids: np.ndarray) -> np.ndarray:
        """int64 [T]: 1 where a feature of a picture stands, 2 of a video, else 0, as ``get_rope_index`` of the Qwen-VL
        models wants it."""
        of_pictures = (token_ids == self.image_token_id).astype(np.int64)
        return of_pictures if self.video_token_id is None else of_pictures + 2 * (token_ids == self.video_token_id)

    def pixels(self, images: Sequence[bytes]) -> dict[str, np.ndarray]:
        """What the tower reads, the pictures' arrays end to end in their order.

        Of the Qwen-VL models ``pixel_values`` [patches, D] and ``image_grid_thw`` [images, 3]; of Idefics3 and SmolVLM
        ``pixel_values`` [tiles, 3, H, W] and ``pixel_attention_mask`` [tiles, H, W], with ``is_nested``. Of videos
        ``pixel_values_videos`` [patches, D], ``video_grid_thw`` [videos, 3] and Qwen2.5-VL's ``second_per_grid_ts``
        [videos].
        """
        arrays = [self._arrays(image) for image in images]
        strip = 1 if arrays and self.is_nested else 0
        return joined(
            [
                {name: values[0] if strip else values for name, values in of_one.items() if name not in _OF_THE_TEXT}
                for of_one in arrays
            ]
        )

    def _expand(self, token_ids: np.ndarray, images: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        kinds = self.token_types(token_ids)
        places = np.flatnonzero(kinds)
        if kinds[places].tolist() != [1 + is_video(image) for image in images] and len(places) == len(images):
            raise RowError("its text has the places of pictures and videos in another order than they are given in")
        if len(places) != len(images):
            raise RowError(
                f"its text has {counted(len(places), 'place')} for a picture ({self.image_token}), and it has "
                f"{counted(len(images), 'picture')}"
            )
        written = [self._replacement(image) for image in images]
        repeats = np.ones(len(token_ids), dtype=np.int64)
        repeats[places] = [len(ids) for ids in written]
        sources = np.repeat(np.arange(len(token_ids)), repeats)
        is_image = np.isin(sources, places)
        expanded = token_ids[sources].astype(np.int32)
        if written:
            expanded[is_image] = np.concatenate(written)
        return expanded, sources, is_image

    def _replacement(self, image: bytes) -> np.ndarray:
        """What the processor writes in the place of the placeholder, int32."""
        video = unpack(image) if is_video(image) else None
        size = size_of(image if video is None else video.frames[0])
        key = size if video is None else (*size, *video[1:])
        if key not in self._written:
            from PIL import Image

            processor = self.processor
            try:
                if video is None:
                    arrays = _process(processor, Image.new("RGB", size))
                else:
                    blank = np.zeros((len(video.frames), size[1], size[0], 3), dtype=np.uint8)
                    arrays = self._process_video(video, blank)
            except (ValueError, ZeroDivisionError) as error:
                what = f"{size[0]} x {size[1]} pixels" + (f" in {len(video.frames)} frames" if video else "")
                raise RowError(f"the image processor refuses {what}: {error}") from error
            if len(self._written) >= _SIZES:
                self._written.clear()
            self._written[key] = arrays["input_ids"][0].astype(np.int32)
        return self._written[key]

    def _arrays(self, image: bytes) -> Mapping[str, np.ndarray]:
        """All that the processor makes of a picture, or of a video."""
        if not is_video(image):
            return _process(self.processor, decode(image))
        video = unpack(image)
        return self._process_video(video, np.stack([np.asarray(decode(frame)) for frame in video.frames]))

    def _process_video(self, video: Video, pixels: np.ndarray) -> Mapping[str, np.ndarray]:
        """The processor's arrays for a video, its pixels uint8 [frames, H, W, 3], in a text that is its placeholder.

        Raises:
            RowError: The processor reads no videos, or as something else.
        """
        assert self._videos is not None
        made = self.processor(
            text=[self.processor.video_token],
            videos=[pixels],
            video_metadata=[video.metadata()],
            do_sample_frames=False,
            input_data_format="channels_last",
            add_special_tokens=False,
            return_tensors="np",
        )
        if _VIDEO_PIXELS not in made or not (made["input_ids"] == self.video_token_id).any():
            raise RowError(f"the {type(self.processor).__name__} reads videos as pictures: give frames as `images`")
        # As tensors they have 32 bits.
        return {n: v.astype(np.float32) if getattr(v, "dtype", None) == np.float64 else v for n, v in made.items()}

    def _check(self) -> None:
        """Looks whether a picture between letters is what it is alone between the letters' tokens.

        Raises:
            DataError: It is not.
        """
        processor, picture = self.processor, _probe_picture()
        letters = [processor.tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in "ab"]
        alone = _process(processor, picture)["input_ids"][0]
        within = _process(processor, picture, f"a{processor.image_token}b")["input_ids"][0]
        if not np.array_equal(within, np.concatenate([letters[0], alone, letters[1]])):
            raise DataError(
                f"model.path: what the {type(processor).__name__} of {self._path} writes for a picture depends on the "
                "text around it, so that prompts and answers cannot be tokenised apart: this model is not supported."
            )


def load_image_processor(model: ModelBlock) -> ImageProcessor | None:
    """That of a model that takes pictures; None of one that takes text alone.

    Args:
        model: With a path.
    """
    assert model.path is not None
    vision = ImageProcessor(
        model.path, model.max_pixels, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    return vision if vision.takes_images else None


def _process(processor: Any, image: Image, text: str | None = None) -> Mapping[str, np.ndarray]:
    """The processor's arrays for one picture in a text, which is the placeholder alone where none is given."""
    return processor(
        text=[processor.image_token if text is None else text],
        images=[image],
        add_special_tokens=False,
        return_tensors="np",
    )


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of several pictures and videos, each name's end to end."""
    names = dict.fromkeys(name for arrays in parts for name in arrays)
    return {name: np.concatenate([arrays[name] for arrays in parts if name in arrays]) for name in names}


def _probe_picture() -> Image:
    from PIL import Image

    return Image.new("RGB", (60, 40), (200, 100, 50))
