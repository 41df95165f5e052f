"""What a vision-language model reads of the pictures of a micro-batch, or a model that hears of its recordings: its
tower's arrays, and positions of its tokens.

pictures of sequence 0, of sequence 2, ...   as encoded bytes, in sequence order; videos among them
    pixel_values, image_grid_thw, ...        end to end, as the model's own processor makes them of each picture
    pixel_values_videos, ...                 of each video
    input_features, ...                      of each recording
    position_ids [4, N]                      the token's place in its text, then time, height and width by the
                                             model's get_rope_index, of each sequence alone; of models without [N]
"""

from __future__ import annotations

import inspect
import io
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from rlflow.actors.vision import has_tower, text_attention
from rlflow.data.audios import kind_of, write_wav
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.image_rows import NAMES
from rlflow.data.messages import Kind
from rlflow.data.processor_calls import joined
from rlflow.data.video_archive import Video, is_video, pack
from rlflow.data.vocabulary import placeholder_ids
from rlflow.recipe import ModelBlock
from rlflow.types import MicroBatch

_CACHE_BYTES = 1 << 28
"""Of arrays that are kept: the rollouts of a group, and the passes over a batch, have the same pictures."""
_MANY_FRAMES = 64
"""More steps in time than the sides of a small video have tokens, which processors enlarge."""
_TYPES = ("mm_token_type_ids", "token_type_ids")
"""What forward passes call the tokens' kinds: 1 where a picture's feature stands."""


Images = tuple[bytes, ...]
"""Of a sequence: encoded pictures, videos and recordings, in the order of their places."""
SOUND = "input_features"
"""What forward passes call what they read of recordings."""


class Pictures(NamedTuple):
    inputs: dict[str, torch.Tensor]
    """Of the model's forward pass, by name."""
    position_ids: torch.Tensor | None
    """int64 [4, N]; None where the model has positions of one dimension alone."""


class RowPictures(NamedTuple):
    inputs: dict[str, torch.Tensor]
    """Of the model's forward pass, by name."""
    position_ids: torch.Tensor | None
    """int64 [4, R, L]; None where the model has positions of one dimension alone."""
    deltas: list[int]
    """Of each row, by how much the rotary position behind its end exceeds its length."""


class Tower:
    """A model's tower for pictures, or for sound, as a TokenModel or ScalarModel uses it."""

    def __init__(self, model: PreTrainedModel, processor: ImageProcessor) -> None:
        self.model, self.processor = model, processor
        self.own_attention = text_attention(model)
        """Of the language model as transformers loaded it."""
        self.problem = ""
        """Why pictures, or recordings, cannot be trained on; empty where they can."""
        self.video_problem = ""
        """Why videos cannot be, where pictures can."""
        self.is_always_run = False
        """Micro-batches without pictures run it too, with a filler: its parameters are trained, or gathered from ranks
        that may have pictures."""
        self.is_run_for_each = False
        """Pictures and videos are two passes through it, and every micro-batch makes both: ranks that gather its
        parameters do so together."""
        self._parameters = inspect.signature(model.base_model.forward).parameters
        self._kept: OrderedDict[bytes, dict[str, np.ndarray]] = OrderedDict()
        self._kept_bytes = 0

    def run_always(self) -> None:
        """Has the tower run as often in every micro-batch from now on, where pictures can be trained on at all."""
        self.is_always_run = not self.problem
        self.is_run_for_each = self.is_always_run and self.processor.takes_videos and not self.video_problem

    def require(self, images: Iterable[bytes] = ()) -> None:
        """
        Raises:
            ValueError: Pictures cannot be trained on, or videos, and there is one.
        """
        if self.problem:
            raise ValueError(f"{type(self.model).__name__}: {self.name}s are not supported: {self.problem}")
        if self.video_problem and any(map(is_video, images)):
            raise ValueError(f"{type(self.model).__name__}: videos are not supported: {self.video_problem}")

    @property
    def name(self) -> str:
        """Of what the tower reads."""
        return NAMES[self.processor.kinds[0]]

    def example(
        self, text: np.ndarray, kind: Kind, *, width: int = 64, num_frames: int = 3
    ) -> tuple[np.ndarray, Images]:
        """A text, int [L], with a picture, a video or a recording behind its second token, int32 [M], and that.

        Args:
            width: Of a recording in hundredths of a second.

        Raises:
            DataError: The model has no processor that can be used.
            RowError: Its processor reads no videos, or no such small ones.
        """
        token = self.processor.placeholders[kind]
        if kind == "audio":
            rate = self.processor.rate
            image = write_wav(np.random.default_rng(width).uniform(-0.5, 0.5, rate * width // 100), rate)
        else:
            image = moving_noise(width, num_frames) if kind == "video" else noise(width)
        others = text[~np.isin(text, [self.processor.image_token_id, *placeholder_ids(self.model.config)])]
        ids = np.insert(others, 2, token).astype(np.int32)
        return self.processor.expand(ids, [image]), (image,)

    def fillers(self, images: Iterable[Images]) -> list[tuple[np.ndarray, Images]]:
        """Sequences that a micro-batch with these pictures is read with, so that the tower is run as it has to be: each
        of a small picture or video, int32 [L], L > 1, and that picture."""
        held = set(map(kind_of, chain.from_iterable(images)))
        kinds = self.processor.kinds if self.is_run_for_each else self.processor.kinds[:1]
        if not self.is_always_run or (held and not self.is_run_for_each):
            return []
        return [self.example(np.zeros(2, dtype=np.int32), kind, width=32) for kind in kinds if kind not in held]

    def read(
        self,
        token_ids: np.ndarray,
        cu_seqlens: np.ndarray,
        images: Sequence[tuple[bytes, ...]],
        device: torch.device,
    ) -> Pictures:
        """
        Args:
            token_ids: int32 [N], with the processor's expansion of each picture.
            cu_seqlens: int32 [S + 1].
            images: Of each sequence; one at least has some.
        """
        per_sequence = [self._pixels(of_one) for of_one in images]
        inputs = joined([arrays for arrays in per_sequence if arrays])
        types = torch.from_numpy(self.processor.token_types(token_ids))
        ids = torch.from_numpy(token_ids).long()
        positions = None
        if hasattr(self.model.base_model, "get_rope_index"):
            spans = [slice(start, end) for start, end in pairwise(cu_seqlens.tolist())]
            parts = [self._positions(ids[s], types[s], own) for s, own in zip(spans, per_sequence, strict=True)]
            positions = torch.cat(parts, dim=1).to(device)
        if self.processor.is_nested:
            inputs = {name: values[None] for name, values in inputs.items()}
        tensors = {name: torch.from_numpy(values) for name, values in inputs.items()}
        tensors |= {name: types[None] for name in _TYPES if name in self._parameters}
        if SOUND in tensors:
            # Towers for pictures see to that themselves.
            tensors[SOUND] = tensors[SOUND].to(self.model.dtype)
        return Pictures({name: values.to(device) for name, values in tensors.items()}, positions)

    def read_rows(
        self, token_ids: np.ndarray, is_token: np.ndarray, images: Sequence[tuple[bytes, ...]], device: torch.device
    ) -> RowPictures:
        """As ``read``, of sequences side by side.

        Args:
            token_ids: int64 [R, L].
            is_token: bool [R, L]; the others are padding.
            images: Of each row; one at least has some.
        """
        bounds = np.concatenate([[0], np.cumsum(is_token.sum(axis=1))])
        read = self.read(token_ids[is_token].astype(np.int32), bounds, images, device)
        types = torch.from_numpy(self.processor.token_types(token_ids) * is_token).to(device)
        inputs = {name: types if name in _TYPES else values for name, values in read.inputs.items()}
        if read.position_ids is None:
            return RowPictures(inputs, None, [0] * len(images))
        position_ids = torch.zeros(4, *token_ids.shape, dtype=torch.long, device=device)
        position_ids[:, torch.from_numpy(is_token).to(device)] = read.position_ids
        ends = [int(own[1:].max()) + 1 - own.shape[1] for own in read.position_ids.split(np.diff(bounds).tolist(), 1)]
        return RowPictures(inputs, position_ids, ends)

    def order_problem(self) -> str:
        """What is wrong with the rotary positions of a text with a video.

        What is behind a video must be behind its times, as the models were made (arXiv 2409.12191, section 2.1);
        Qwen2-VL and Qwen2.5-VL of transformers 5.19 count on from the video's sides.

        Raises:
            DataError, RowError: As ``example``.
        """
        token_ids, images = self.example(np.zeros(4, dtype=np.int32), "video", width=32, num_frames=_MANY_FRAMES)
        positions = self.read(token_ids, np.array([0, len(token_ids)]), [images], torch.device("cpu")).position_ids
        if positions is None:
            return ""
        rotary, last = positions[1:].amax(0), int(np.flatnonzero(self.processor.is_placeholder(token_ids))[-1])
        if rotary[last + 1] > rotary[: last + 1].max():
            return ""
        return (
            "transformers gives the text behind a video positions within the video's times, which the model was not "
            "made with. Train Qwen3-VL, or give frames as images"
        )

    def _positions(self, ids: torch.Tensor, types: torch.Tensor, arrays: Mapping[str, np.ndarray]) -> torch.Tensor:
        """ids, types int64 [L] of one sequence -> int64 [4, L]."""
        places = torch.arange(len(ids))
        if not arrays:
            return places.expand(4, -1)
        get_rope_index: Any = self.model.base_model.get_rope_index
        wanted = inspect.signature(get_rope_index).parameters
        grids = {name: torch.from_numpy(values) for name, values in arrays.items() if name in wanted}
        rotary, _ = get_rope_index(input_ids=ids[None], mm_token_type_ids=types[None], **grids)
        return torch.cat([places[None], rotary[:, 0]])

    def _pixels(self, images: Sequence[bytes]) -> dict[str, np.ndarray]:
        return joined([self._of_one(image) for image in images])

    def _of_one(self, image: bytes) -> dict[str, np.ndarray]:
        """A picture's arrays, from the cache where it has them."""
        found = self._kept.pop(image, None)
        if found is None:
            found = self.processor.pixels([image])
            self._kept_bytes += _size(found)
        self._kept[image] = found
        while self._kept_bytes > _CACHE_BYTES and len(self._kept) > 1:
            self._kept_bytes -= _size(self._kept.popitem(last=False)[1])
        return found


def tower_of(model: PreTrainedModel, block: ModelBlock) -> Tower | None:
    """None of a model that reads text alone."""
    if not has_tower(model.config):
        return None
    assert block.path is not None
    processor = ImageProcessor(block.path, revision=block.revision, trust_remote_code=block.trust_remote_code)
    return Tower(model, processor)


class Read(NamedTuple):
    """What a forward pass reads of a micro-batch: its own sequences, and behind them fillers with a picture where
    the tower is always run and the micro-batch has none."""

    token_ids: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: np.ndarray
    loss_mask: np.ndarray
    images: Sequence[tuple[bytes, ...]]


def read_batch(batch: MicroBatch, tower: Tower | None) -> Read:
    """What a forward pass reads of a micro-batch; see Read."""
    read = Read(batch.token_ids, batch.position_ids, batch.cu_seqlens, batch.loss_mask, batch.images)
    for ids, images in () if tower is None else tower.fillers(batch.images):
        read = Read(
            np.concatenate([read.token_ids, ids]),
            np.concatenate([read.position_ids, np.arange(len(ids), dtype=np.int32)]),
            np.append(read.cu_seqlens, read.cu_seqlens[-1] + len(ids)).astype(np.int32),
            np.concatenate([read.loss_mask, np.zeros(len(ids), dtype=bool)]),
            [*(read.images or ((),) * (len(read.cu_seqlens) - 1)), images],
        )
    return read


def require_tower(tower: Tower | None, images: Iterable[bytes]) -> Tower:
    """
    Raises:
        ValueError: The model does not read pictures, or videos where there is one.
    """
    if tower is None:
        if "audio" in map(kind_of, images):
            raise ValueError("the data has recordings, and the model reads text alone: name a model that hears")
        raise ValueError("the data has pictures, and the model reads text alone: name a vision-language model")
    tower.require(images)
    return tower


def read_pictures(
    tower: Tower | None,
    token_ids: np.ndarray,
    cu_seqlens: np.ndarray,
    images: Sequence[tuple[bytes, ...]],
    device: torch.device,
) -> Pictures | None:
    """None where there are no pictures.

    Raises:
        ValueError: There are, and the model cannot be trained on them.
    """
    if not any(images):
        return None
    return require_tower(tower, chain.from_iterable(images)).read(token_ids, cu_seqlens, images, device)


def moving_noise(width: int, num_frames: int) -> bytes:
    """A video of frames in which something moves; processors make a step in time of two of them."""
    frames = tuple(noise(width, seed=seed) for seed in range(num_frames))
    return pack(Video(frames, tuple(range(num_frames)), 1.0, num_frames))


def noise(width: int, height: int = 32, seed: int = 0) -> bytes:
    """A picture without a pixel that towers take for padding, as PNG."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _size(arrays: Mapping[str, np.ndarray]) -> int:
    return sum(values.nbytes for values in arrays.values())
