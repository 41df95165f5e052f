"""What a model makes of pictures and videos, or of recordings: how many tokens each is, and what its tower reads.

It is the model's own transformers processor, called for one picture at a time, so that what becomes of a picture
depends on nothing beside it. What a chat template writes has one placeholder a picture; training sees what the
processor writes in its place, which the picture's size alone decides. Of a video it is also the number of its frames
and their times, and of a recording its length. Where nothing else is said, what is said of pictures holds of both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlflow.data.audios import decode_audio, is_audio, kind_of, load_audio
from rlflow.data.errors import DataError, RowError, counted
from rlflow.data.images import LONGEST_PATH, decode, load_image, size_of
from rlflow.data.messages import Kind
from rlflow.data.processor_calls import blank, joined, process_audio, process_picture, process_video
from rlflow.data.video_archive import is_video, unpack
from rlflow.data.videos import FRAMES_PER_SECOND, load_video
from rlflow.torchvision_operators import install

if TYPE_CHECKING:
    from rlflow.recipe import ModelBlock

_OF_THE_TEXT = {"input_ids", "attention_mask", "video_metadata", "num_audio_tokens"} | {
    *("token_type_ids", "mm_token_type_ids")
}
"""What a processor returns that is not of the pictures."""
_TYPE_IDS: dict[Kind, int] = {"image": 1, "video": 2, "audio": 3}
_OF_PICTURES = ("image_processor", "image_token", "Qwen3-VL, Qwen2.5-VL, Idefics3 and SmolVLM")
"""What a processor must have, and models whose processors have it."""
_OF_SOUND = ("feature_extractor", "audio_token", "Qwen2-Audio and Audio Flamingo 3")

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
        self._files: dict[tuple[Path, str, Kind], bytes] = {}
        """Pictures of paths: several rows may show the same one."""
        self._heard = 0
        """Samples of the longest recording that is known to be read up to its end."""

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
            kind = "audio" if self.takes_audios else "image"
            raise DataError(
                f"model.path: the {kind} processor of {self._path} cannot be loaded: {error}. It needs "
                "preprocessor_config.json or processor_config.json beside the model, and the packages that it names."
            ) from error
        part, token, known = _OF_SOUND if self.takes_audios else _OF_PICTURES
        if not hasattr(processor, part) or getattr(processor, token, None) is None:
            raise DataError(
                f"model.path: {self._path} has a {type(processor).__name__}, which has no {token}, the placeholder of "
                f"what it reads. Models whose processor writes one are supported, such as {known}."
            )
        return processor

    @cached_property
    def image_token(self) -> str:
        """The placeholder of pictures, or of a model that hears of recordings, as text."""
        self._check()
        return self._token

    @property
    def _token(self) -> str:
        return str(self.processor.audio_token if self.takes_audios else self.processor.image_token)

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

    @property
    def takes_audios(self) -> bool:
        """Whether the model has a tower for sound and none for pictures, by its config."""
        return "audio_config" in self._config and not self.takes_images

    @property
    def kinds(self) -> list[Kind]:
        """What the model has a placeholder of."""
        return list(self.placeholders)

    @cached_property
    def placeholders(self) -> dict[Kind, int]:
        """The placeholder of each kind, also what the tower's features take the places of: pictures and perhaps
        videos, or recordings."""
        if self.takes_audios:
            return {"audio": self.image_token_id}
        found: dict[Kind, int] = {"image": self.image_token_id}
        if self.video_token_id is not None:
            found["video"] = self.video_token_id
        return found

    @cached_property
    def image_token_id(self) -> int:
        """The placeholder of pictures, or of a model that hears of recordings. Text alone needs no processor."""
        kind = "audio" if self.takes_audios else "image"
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
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
        return not self.takes_audios and process_picture(self.processor, blank(60, 40))["pixel_values"].ndim == 5

    @property
    def takes_max_pixels(self) -> bool:
        """Whether the processor itself scales pictures down to ``max_pixels``, as the Qwen-VL models'."""
        return "max_pixels" in self.processor.image_processor.valid_kwargs.__annotations__

    @property
    def rate(self) -> int:
        """Samples a second of the sound that the model hears."""
        return int(self.processor.feature_extractor.sampling_rate)

    @property
    def window(self) -> int:
        """Hundredths of a second that the model hears at a time, of longer recordings one after the other; 0 where its
        extractor does not say."""
        return int(100 * getattr(self.processor.feature_extractor, "chunk_length", 0))

    def load(self, value: Any, directory: Path, kind: Kind = "image") -> bytes:
        """A row's picture, encoded: ``load_image`` with the model's ``max_pixels``; or its video, as an archive of the
        frames that its own video processor samples: ``load_video`` of rlflow.data.videos; or its recording:
        ``load_audio`` of rlflow.data.audios.

        Raises:
            RowError: It cannot be used.
        """

        def load() -> bytes:
            if kind == "audio":
                return load_audio(value, directory, self.rate)
            if kind == "video":
                return load_video(value, directory, self.max_pixels, self._sample)
            return load_image(value, directory, self.max_pixels)

        if not isinstance(value, str) or len(value) > LONGEST_PATH:
            return load()
        if (directory, value, kind) not in self._files:
            self._files[directory, value, kind] = load()
        return self._files[directory, value, kind]

    def _sample(self, metadata: Any, fps: float | None, num_frames: int | None) -> list[int]:
        """Which frames of a file the processor takes: Sampler."""
        videos = self._of_videos.video_processor
        own = {name: getattr(videos, name, None) for name in videos.valid_kwargs.__annotations__}
        if num_frames is not None:
            own |= {"num_frames": min(num_frames, metadata.total_num_frames), "fps": None}
        elif fps is not None or own.get("num_frames") is None:
            own |= {"num_frames": None, "fps": fps or own.get("fps") or FRAMES_PER_SECOND}
        return [int(index) for index in videos.sample_frames(metadata, **own)]

    @property
    def _of_videos(self) -> Any:
        """The processor, which reads videos.

        Raises:
            RowError: It reads none.
        """
        processor = self.processor
        if getattr(processor, "video_processor", None) is None or getattr(processor, "video_token", None) is None:
            raise RowError(f"the {type(processor).__name__} of {self._path} reads no videos: give frames as `images`")
        return processor

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
        models wants it; 3 of a recording."""
        types = np.zeros(token_ids.shape, dtype=np.int64)
        for kind, token_id in self.placeholders.items():
            types[token_ids == token_id] = _TYPE_IDS[kind]
        return types

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
        if kinds[places].tolist() != [_TYPE_IDS[kind_of(image)] for image in images] and len(places) == len(images):
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
        if is_audio(image):
            return self._written_for_sound(len(decode_audio(image)))
        video = unpack(image) if is_video(image) else None
        size = size_of(image if video is None else video.frames[0])
        key = size if video is None else (*size, *video[1:])
        if key not in self._written:
            processor = self.processor
            try:
                if video is None:
                    arrays = process_picture(processor, blank(*size))
                else:
                    pixels = np.zeros((len(video.frames), size[1], size[0], 3), dtype=np.uint8)
                    arrays = process_video(self._of_videos, video, pixels)
            except (ValueError, ZeroDivisionError) as error:
                what = f"{size[0]} x {size[1]} pixels" + (f" in {len(video.frames)} frames" if video else "")
                raise RowError(f"the image processor refuses {what}: {error}") from error
            if len(self._written) >= _SIZES:
                self._written.clear()
            self._written[key] = arrays["input_ids"][0].astype(np.int32)
        return self._written[key]

    def _arrays(self, image: bytes) -> Mapping[str, np.ndarray]:
        """All that the processor makes of a picture, of a video, or of a recording."""
        if is_audio(image):
            return process_audio(self.processor, decode_audio(image))
        if not is_video(image):
            return process_picture(self.processor, decode(image))
        video = unpack(image)
        return process_video(self._of_videos, video, np.stack([np.asarray(decode(frame)) for frame in video.frames]))

    def _written_for_sound(self, samples: int) -> np.ndarray:
        """What the processor writes for a recording of so many samples, int32.

        Raises:
            RowError: It leaves out the end of such a recording, or it is too short.
        """
        if (key := ("audio", samples)) not in self._written:
            silence = np.zeros(samples, dtype=np.float32)
            made = process_audio(self.processor, silence)
            ids = made["input_ids"][0].astype(np.int32)
            # transformers takes one placeholder for a text that is still to be expanded.
            if (ids == self.image_token_id).sum() < 2:
                raise RowError(f"it is {samples / self.rate:.3f} seconds long, too short for the model")
            if samples > self._heard:
                silence[-max(1, self.rate // 10) :] = 0.5
                again = process_audio(self.processor, silence)
                if all(np.array_equal(values, again[name]) for name, values in made.items()):
                    raise RowError(
                        f"it is {samples / self.rate:.1f} seconds long, and the {type(self.processor).__name__} leaves "
                        "out its end: cut it into shorter ones"
                    )
                self._heard = samples
            if len(self._written) >= _SIZES:
                self._written.clear()
            self._written[key] = ids
        return self._written[key]

    def _probe_ids(self, text: str) -> np.ndarray:
        """Token ids of a text with one placeholder, for a small picture or a second of silence."""
        if self.takes_audios:
            return process_audio(self.processor, np.zeros(self.rate, dtype=np.float32), text)["input_ids"][0]
        return process_picture(self.processor, blank(60, 40), text)["input_ids"][0]

    def _check(self) -> None:
        """Looks whether a picture between letters is what it is alone between the letters' tokens.

        Raises:
            DataError: It is not.
        """
        processor = self.processor
        letters = [processor.tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in "ab"]
        alone, within = (self._probe_ids(text) for text in (self._token, f"a{self._token}b"))
        if not np.array_equal(within, np.concatenate([letters[0], alone, letters[1]])):
            raise DataError(
                f"model.path: what the {type(processor).__name__} of {self._path} writes for a picture depends on the "
                "text around it, so that prompts and answers cannot be tokenised apart: this model is not supported."
            )


def load_image_processor(model: ModelBlock) -> ImageProcessor | None:
    """That of a model that takes pictures or recordings; None of one that takes text alone.

    Args:
        model: With a path.
    """
    assert model.path is not None
    vision = ImageProcessor(
        model.path, model.max_pixels, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    return vision if vision.takes_images or vision.takes_audios else None
